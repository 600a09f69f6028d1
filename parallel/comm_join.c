// Joining a run (comm_join.h): who is rank what, from the launcher's variables; a star of TCP
// connections around rank 0, or MPI; where each rank runs. Rank 0 listens at the address that the
// ranks use, hears many connections at once, and knows its own by the run's token: who sends
// anything else, or nothing, is dropped and holds nobody up.
#define _GNU_SOURCE
#include "comm_join.h"
#include "../kernels/fail.h"
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#ifdef MOE_MPI
#include <mpi.h>
#endif

enum { SINGLE, TCP, MPI };
enum { PORT_DEFAULT = 29500, HELLO = 0x6d6f6563, WELCOME = 0x6d6f6564 };
static int how = SINGLE;
static Joined here = { 0, 1, 0, 1, 0 };
static uint64_t *machines; // here.machine
static char master[256];
static int port, *peer, n_peers; // tcp: rank 0 has a socket to each rank (-1 at its own place), the
                                 // others one, to rank 0
static int threads_multiple = 1;
static size_t published; // bytes of a message of the watchdogs
#ifdef MOE_MPI
enum { CHANNEL_TAG = 77 };
static MPI_Comm channel = MPI_COMM_NULL; // of the watchdogs
#endif
static uint64_t token; // of this run, from the launcher's variables; 0 = they name none

// ---- who am I -------------------------------------------------------------------------------
void join_first_host(const char *list, char *name, size_t size) {
    size_t n = 0;
    int inside = 0;
    for (const char *p = list; *p; p++) {
        if (*p == '[') {
            inside = 1;
            continue;
        }
        if (*p == ']') {
            inside = 0;
            continue;
        }
        if (*p == ',' && !inside) break;
        if (inside && (*p == ',' || *p == '-')) { // the first number of the brackets; what follows
                                                  // them still belongs to the name
            while (p[1] && p[1] != ']') p++;
            continue;
        }
        if (n + 1 < size) name[n++] = *p;
    }
    name[n] = 0;
}

static const char *setting(const char *name, const char *other) {
    const char *value = getenv(name);
    if ((!value || !*value) && other) value = getenv(other);
    return value && *value ? value : 0;
}

static int number(const char *name, const char *text) {
    char *end;
    long value = strtol(text, &end, 10);
    if (*end || value < 0 || value > 1 << 24)
        die("%s=%s is no count|it is set by the launcher; unset it to run one process", name, text);
    return (int)value;
}

// FNV-1a, going on from `hash`.
static uint64_t hash_text(uint64_t hash, const char *text) {
    if (!hash) hash = 0xcbf29ce484222325u;
    for (; *text; text++) hash = (hash ^ (unsigned char)*text) * 0x100000001b3u;
    return hash;
}

// What the launcher gives to all ranks of a run and to no other run.
static void read_token(void) {
    static const char *const names[] = { "MOE_RUN_ID", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID",
                                         "SLURM_STEP_ID" };
    token = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (setting(names[i], 0)) token = hash_text(token, getenv(names[i]));
}

static int mpi_launched(void) {
    const char *wanted = setting("MOE_JOIN", 0);
    if (wanted && !strcmp(wanted, "tcp")) return 0;
    static const char *const set_by[] = {
        "OMPI_COMM_WORLD_SIZE", "PMIX_RANK",      "PMI_RANK", "PMI_SIZE",
        "MV2_COMM_WORLD_SIZE",  "MPI_LOCALNRANKS"
    };
    for (size_t i = 0; i < sizeof set_by / sizeof *set_by; i++)
        if (getenv(set_by[i])) return 1;
    return 0;
}

static void read_environment(void) {
    const char *size = setting("WORLD_SIZE", 0);
    const char *rank = setting("RANK", 0);
    const char *at = setting("MASTER_PORT", 0);
    const char *step = setting("SLURM_STEP_NUM_TASKS", 0);
    if (size && rank) {
        here.size = number("WORLD_SIZE", size);
        here.rank = number("RANK", rank);
        if (here.size > 1 && !setting("MASTER_ADDR", 0))
            die("WORLD_SIZE=%s and no MASTER_ADDR|set it to the host of rank 0", size);
        snprintf(master, sizeof master, "%s", here.size > 1 ? getenv("MASTER_ADDR") : "");
        port = at ? number("MASTER_PORT", at) : PORT_DEFAULT;
    } else if (step &&
               setting(
                   "SLURM_PROCID",
                   0)) { // a step of srun; a batch script's own shell has SLURM_PROCID but no step
        const char *nodes = setting("SLURM_STEP_NODELIST", "SLURM_NODELIST");
        const char *job = setting("SLURM_JOB_ID", 0);
        here.size = number("SLURM_STEP_NUM_TASKS", step);
        here.rank = number("SLURM_PROCID", getenv("SLURM_PROCID"));
        if (here.size > 1 && !nodes && !setting("MASTER_ADDR", 0))
            die("a Slurm step of %d tasks without SLURM_NODELIST|set MASTER_ADDR to the host of "
                "rank 0",
                here.size);
        if (setting("MASTER_ADDR", 0))
            snprintf(master, sizeof master, "%s", getenv("MASTER_ADDR"));
        else
            join_first_host(nodes ? nodes : "", master, sizeof master);
        int offset = job ? number("SLURM_JOB_ID", job) % 20000 : 0;
        port = at ? number("MASTER_PORT", at) : 10000 + offset;
    } else
        return;
    if (here.size < 1 || here.rank >= here.size)
        die("rank %d of %d ranks, from the launcher's variables|RANK counts from 0 to WORLD_SIZE - "
            "1",
            here.rank, here.size);
    if (here.size > 1) how = TCP;
    read_token();
}

static void abort_all(void) { join_abort(1); }

void join_init(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    if (!mpi_launched()) read_environment();
#ifdef MOE_MPI
    else {
        int level;
        how = MPI;
        if (MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &level) != MPI_SUCCESS)
            die("MPI_Init failed|see its message; without mpirun the program runs alone");
        threads_multiple = level >= MPI_THREAD_MULTIPLE;
        MPI_Comm_rank(MPI_COMM_WORLD, &here.rank);
        MPI_Comm_size(MPI_COMM_WORLD, &here.size);
    }
#else
    else {
        const char *n = setting("OMPI_COMM_WORLD_SIZE", "PMI_SIZE");
        if (n && atoi(n) > 1)
            die("started by an MPI launcher with %s ranks, but built without MPI|install MPI and "
                "build again, or start with torchrun or srun --mpi=none",
                n);
        read_environment(); // srun --mpi=pmix sets no such number; Slurm's own variables tell as
                            // much
    }
#endif
    die_set(here.rank, abort_all);
}

const Joined *joined(void) { return &here; }
int join_threads(void) { return threads_multiple; }

const char *join_describe(void) {
    static char text[512];
    if (how == SINGLE) return "one process";
    snprintf(text, sizeof text, "tcp, rank 0 at %s:%d", master, port);
#ifdef MOE_MPI
    if (how == MPI) {
        char version[MPI_MAX_LIBRARY_VERSION_STRING];
        int length;
        MPI_Get_library_version(version, &length);
        version[strcspn(version, ",\n")] = 0;
        snprintf(text, sizeof text, "mpi (%.400s)", version);
    }
#endif
    return text;
}

// ---- where am I: the kernel's boot id is the same for all containers of a machine and differs
// between machines of one name ----
static uint64_t this_machine(void) {
    char text[320] = "";
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (!f || !fgets(text, 64, f)) gethostname(text, sizeof text - 1);
    if (f) fclose(f);
    return hash_text(0, text);
}

static void place_ranks(void) {
    here.machine = machines;
    here.local_rank = here.local_size = 0;
    for (int r = 0; r < here.size; r++)
        if (machines[r] == machines[here.rank]) {
            here.local_size++;
            if (r < here.rank) here.local_rank++;
        }
}

// ---- tcp: a star around rank 0 --------------------------------------------------------------
typedef struct {
    int32_t magic, rank, size, unused;
    uint64_t machine, token;
} Hello;

static void nap(void) {
    struct timespec t = { 0, 100 * 1000 * 1000 };
    nanosleep(&t, 0);
}

// All of n bytes, or 0.
static int send_bytes(int fd, const void *bytes, size_t n) {
    for (const char *p = (const char *)bytes; n;) {
        ssize_t k = send(fd, p, n, MSG_NOSIGNAL);
        if (k < 0 && errno == EINTR) continue;
        if (k <= 0) return 0;
        p += k;
        n -= k;
    }
    return 1;
}
static int recv_bytes(int fd, void *bytes, size_t n) {
    for (char *p = (char *)bytes; n;) {
        ssize_t k = recv(fd, p, n, 0);
        if (k < 0 && errno == EINTR) continue;
        if (k <= 0) return 0;
        p += k;
        n -= k;
    }
    return 1;
}
static void must(int ok, int rank) {
    if (!ok) die("the connection to rank %d broke during set-up|its own message says why", rank);
}

static void limit_receive(int fd, double seconds) { // 0: none
    struct timeval t = { (time_t)seconds, 0 };
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
}

// A socket that listens at `address`, or -1.
static int listen_at(int family, const struct sockaddr *address, socklen_t size) {
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int on = 1;
    int off = 0;
    if (fd < 0) return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (!bind(fd, address, size) && !listen(fd, 1024)) return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

static int is_loopback(const struct addrinfo *a) {
    if (a->ai_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)(const void *)a->ai_addr)->sin_addr.s_addr) >>
                   24 ==
               127;
    return IN6_IS_ADDR_LOOPBACK(
        &((const struct sockaddr_in6 *)(const void *)a->ai_addr)->sin6_addr);
}

// The addresses of a host, or this machine's own (name 0).
static struct addrinfo *addresses(const char *name, int family, int *error) {
    struct addrinfo hints, *list = 0;
    char service[16];
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_family = family;
    if (!name) hints.ai_flags = AI_PASSIVE;
    snprintf(service, sizeof service, "%d", port);
    *error = getaddrinfo(name, service, &hints, &list);
    return *error ? 0 : list;
}

// The first of these addresses that this machine has. A host's own name may stand for a loopback
// address in its hosts file, at which no other machine can reach it: only who says localhost means
// it.
static int listen_in(struct addrinfo *list, int loopback) {
    int fd = -1;
    for (struct addrinfo *a = list; a && fd < 0; a = a->ai_next)
        if (loopback || !is_loopback(a)) fd = listen_at(a->ai_family, a->ai_addr, a->ai_addrlen);
    return fd;
}

static int listen_at_name(const char *name, int family, int loopback) {
    int error;
    struct addrinfo *list = addresses(name, family, &error);
    errno = 0;
    int fd = listen_in(list, loopback);
    if (list) freeaddrinfo(list);
    return fd;
}

static int listener(void) {
    int loopback =
        !strcmp(master, "localhost") || !strncmp(master, "127.", 4) || !strcmp(master, "::1");
    int fd = listen_at_name(master, AF_UNSPEC, loopback);
    // An address that is not of this machine (it is translated on the way, say): any of its own, by
    // IPv6 sockets, which hear IPv4 too, where there are some.
    if (fd < 0 && errno != EADDRINUSE) fd = listen_at_name(0, AF_INET6, 1);
    if (fd < 0 && errno != EADDRINUSE) fd = listen_at_name(0, AF_INET, 1);
    if (fd < 0)
        die("rank 0 cannot listen at port %d: %s|another run on this machine? set MASTER_PORT to a "
            "free one, on all ranks",
            port, strerror(errno));
    return fd;
}

// A connection that has not said who it is. It has SPEAK seconds for that.
enum { GUESTS = 256, SPEAK = 5 };
typedef struct {
    int fd;
    size_t got;
    double until;
    Hello hello;
} Guest;

// Reads what has come. Returns 1 while the guest may still become a rank of this run.
static int hear(Guest *g) {
    ssize_t k = recv(g->fd, (char *)&g->hello + g->got, sizeof g->hello - g->got, MSG_DONTWAIT);
    if (k < 0) return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
    g->got += k;
    if (k == 0 || (g->got >= sizeof(int32_t) && g->hello.magic != HELLO)) return 0;
    return g->got < sizeof g->hello || g->hello.token == token;
}

// Takes in a guest that has said the run's token; 0 if it does not belong here all the same.
static void take_in(const Guest *g) {
    const Hello *h = &g->hello;
    int known = h->rank > 0 && h->rank < here.size && peer[h->rank] >= 0;
    if (h->size != here.size || h->rank < 1 || h->rank >= here.size || known)
        die("a process joins as rank %d of %d, this run has %d ranks%s|two runs share port %d, or "
            "the launcher's variables are mixed up",
            h->rank, h->size, here.size, known ? " and has that one" : "", port);
    peer[h->rank] = g->fd;
    machines[h->rank] = h->machine;
}

static void say_who_is_missing(int missing) {
    int r = 1;
    while (peer[r] >= 0) r++;
    die("%d of %d ranks did not come to %s:%d, the first is rank %d|start all of them; see whether "
        "they reach that address",
        missing, here.size, master, port, r);
}

static void welcome_all(double until) {
    static Guest guest[GUESTS];
    struct pollfd p[GUESTS + 1];
    int fd = listener();
    int missing = here.size - 1;
    int guests = 0;
    n_peers = here.size;
    peer = (int *)xmalloc(n_peers * sizeof *peer, "connections");
    for (int r = 0; r < n_peers; r++) peer[r] = -1;
    while (missing) {
        double now = now_seconds();
        if (now >= until) say_who_is_missing(missing);
        for (int i = 0; i <= guests; i++) {
            struct pollfd ask = { i < guests ? guest[i].fd : fd, POLLIN, 0 };
            p[i] = ask;
        }
        poll(p, (nfds_t)guests + 1, 100);
        int c = accept4(fd, 0, 0, SOCK_CLOEXEC);
        int kept = 0;
        for (int i = 0; i < guests; i++) {
            Guest *g = &guest[i];
            int may_stay = hear(g) && now < g->until;
            if (may_stay && g->got == sizeof g->hello) {
                take_in(g);
                missing--;
            } else if (may_stay)
                guest[kept++] = *g;
            else
                close(g->fd);
        }
        guests = kept;
        if (c < 0) continue;
        if (guests == GUESTS) { // a flood of connections: who has been silent longest goes
            close(guest[0].fd);
            memmove(guest, guest + 1, --guests * sizeof *guest);
        }
        Guest fresh = { c, 0, now + SPEAK, { 0, 0, 0, 0, 0, 0 } };
        guest[guests++] = fresh;
    }
    for (int i = 0; i < guests; i++) close(guest[i].fd);
    close(fd);
    Hello w = { WELCOME, 0, here.size, 0, machines[0], token };
    size_t table = here.size * sizeof *machines;
    for (int r = 1; r < n_peers; r++)
        must(send_bytes(peer[r], &w, sizeof w) && send_bytes(peer[r], machines, table), r);
}

static int connect_once(const char **why) {
    int fd = -1;
    int error;
    struct addrinfo *list = addresses(master, AF_UNSPEC, &error);
    if (!list) *why = gai_strerror(error);
    for (struct addrinfo *a = list; a && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
        if (fd >= 0 && !connect(fd, a->ai_addr, a->ai_addrlen)) break;
        *why = strerror(errno);
        if (fd >= 0) close(fd);
        fd = -1;
    }
    if (list) freeaddrinfo(list);
    return fd;
}

static void meet_rank_0(double until) {
    Hello h = { HELLO, here.rank, here.size, 0, machines[here.rank], token };
    Hello w;
    const char *why = "";
    int fd;
    int on = 1;
    while ((fd = connect_once(&why)) < 0) {
        if (now_seconds() > until)
            die("rank %d cannot reach rank 0 at %s:%d: %s|MASTER_ADDR and MASTER_PORT must name "
                "the host of rank 0; a firewall?",
                here.rank, master, port, why);
        nap();
    }
    double left = until - now_seconds();
    limit_receive(fd, left > 1 ? left + 1 : 2); // rank 0 knows who is missing: let it speak first
    if (!send_bytes(fd, &h, sizeof h) || !recv_bytes(fd, &w, sizeof w) || w.magic != WELCOME ||
        !recv_bytes(fd, machines, here.size * sizeof *machines))
        die("rank 0 at %s:%d did not answer rank %d|its own message says why; or another program "
            "listens at that port",
            master, port, here.rank);
    limit_receive(fd, 0);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    peer = (int *)xmalloc(sizeof *peer, "connections");
    peer[0] = fd;
    n_peers = 1;
}

void join_connect(double timeout) {
    machines = (uint64_t *)xcalloc(here.size, sizeof *machines, "places of ranks");
    machines[here.rank] = this_machine();
    double until = now_seconds() + timeout;
    if (how == TCP && here.rank == 0)
        welcome_all(until);
    else if (how == TCP)
        meet_rank_0(until);
#ifdef MOE_MPI
    uint64_t mine = machines[here.rank];
    if (how == MPI) MPI_Allgather(&mine, 8, MPI_BYTE, machines, 8, MPI_BYTE, MPI_COMM_WORLD);
    if (how == MPI) MPI_Comm_dup(MPI_COMM_WORLD, &channel);
#endif
    place_ranks();
}

void join_broadcast(void *bytes, size_t n) {
    if (how == TCP && here.rank == 0)
        for (int r = 1; r < n_peers; r++) must(send_bytes(peer[r], bytes, n), r);
    else if (how == TCP)
        must(recv_bytes(peer[0], bytes, n), 0);
#ifdef MOE_MPI
    if (how == MPI) MPI_Bcast(bytes, (int)n, MPI_BYTE, 0, MPI_COMM_WORLD);
#endif
}

int join_lost(void) {
    for (int i = 0; i < n_peers; i++) {
        char byte;
        if (peer[i] < 0) continue;
        ssize_t k = recv(peer[i], &byte, 1, MSG_PEEK | MSG_DONTWAIT);
        if (k == 0 || (k < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR))
            return i; // a byte that waits is a goodbye: not gone yet
    }
    return -1;
}

// ---- messages of the watchdogs: a byte that says what it is, then a message ------------------
enum { BYE = 0, PRESENT = 1, TOLD = 2 };

void join_publish(const void *message, size_t bytes) {
    char frame[2048] = { PRESENT };
    if (how == TCP && here.rank > 0 && peer && bytes < sizeof frame) {
        memcpy(frame + 1, message, bytes);
        ssize_t k = send(peer[0], frame, bytes + 1, MSG_NOSIGNAL | MSG_DONTWAIT);
        // The rest of a message that was cut must follow.
        if (k > 0 && k < (ssize_t)bytes + 1) send_bytes(peer[0], frame + k, bytes + 1 - k);
    }
#ifdef MOE_MPI
    if (how == MPI && here.rank > 0 && threads_multiple && channel != MPI_COMM_NULL)
        MPI_Send(message, (int)bytes, MPI_BYTE, 0, CHANNEL_TAG, channel);
#endif
}

void join_collect(void *all, size_t bytes) {
    published = bytes;
    for (int r = 1; how == TCP && r < n_peers; r++) {
        char kind;
        while (recv(peer[r], &kind, 1, MSG_PEEK | MSG_DONTWAIT) == 1 && kind == PRESENT)
            if (!recv_bytes(peer[r], &kind, 1) ||
                !recv_bytes(peer[r], (char *)all + r * bytes, bytes))
                break;
    }
#ifdef MOE_MPI
    int here_is_one = how == MPI && threads_multiple && channel != MPI_COMM_NULL;
    while (here_is_one) {
        MPI_Status status;
        MPI_Iprobe(MPI_ANY_SOURCE, CHANNEL_TAG, channel, &here_is_one, &status);
        if (here_is_one)
            MPI_Recv((char *)all + status.MPI_SOURCE * bytes, (int)bytes, MPI_BYTE,
                     status.MPI_SOURCE, CHANNEL_TAG, channel, MPI_STATUS_IGNORE);
    }
#else
    (void)all;
    (void)bytes;
#endif
}

void join_tell_end(void) {
    char kind = TOLD;
    for (int r = 1; how == TCP && here.rank == 0 && r < n_peers; r++)
        if (send(peer[r], &kind, 1, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) continue;
}

int join_told_end(void) {
    char kind = BYE;
    if (how != TCP || here.rank == 0 || !peer) return 0;
    return recv(peer[0], &kind, 1, MSG_PEEK | MSG_DONTWAIT) == 1 && kind == TOLD;
}

#ifdef MOE_MPI
// What was published and not collected.
static void drain_channel(void) {
    int waits = here.rank == 0;
    char message[2048];
    while (waits) {
        MPI_Iprobe(MPI_ANY_SOURCE, CHANNEL_TAG, channel, &waits, MPI_STATUS_IGNORE);
        if (waits)
            MPI_Recv(message, sizeof message, MPI_BYTE, MPI_ANY_SOURCE, CHANNEL_TAG, channel,
                     MPI_STATUS_IGNORE);
    }
    if (channel != MPI_COMM_NULL) MPI_Comm_free(&channel);
}
#endif

// Reads what a rank has published until its goodbye comes.
static int hear_goodbye(int fd) {
    char kind = PRESENT;
    while (recv_bytes(fd, &kind, 1) && kind == PRESENT) {
        char message[2048];
        if (!recv_bytes(fd, message, published)) return 0;
    }
    return kind == BYE;
}

void join_leave(void) {
    char byte = BYE;
    // Everybody says goodbye to rank 0, which answers when it has heard all: nobody's connection
    // closes while a watchdog still looks at it.
    if (peer && here.rank == 0) {
        for (int r = 1; r < n_peers; r++) must(hear_goodbye(peer[r]), r);
        for (int r = 1; r < n_peers; r++) must(send_bytes(peer[r], &byte, 1), r);
    } else if (peer)
        must(send_bytes(peer[0], &byte, 1) && recv_bytes(peer[0], &byte, 1), 0);
    for (int i = 0; i < n_peers; i++)
        if (peer[i] >= 0) close(peer[i]);
    free(peer);
    peer = 0;
    n_peers = 0;
#ifdef MOE_MPI
    if (how == MPI) {
        MPI_Barrier(MPI_COMM_WORLD);
        drain_channel();
        MPI_Finalize();
    }
#endif
    free(machines);
    machines = 0;
    here.machine = 0;
}

void join_abort(int status) {
#ifdef MOE_MPI
    if (how == MPI) {
        // MPI_Abort may itself be stuck when the network is: the signal then ends this process, and
        // the launcher the others.
        signal(SIGALRM, SIG_DFL);
        alarm(5);
        MPI_Abort(MPI_COMM_WORLD, status);
    }
#endif
    fflush(0);
    _exit(status ? status : 1);
}
