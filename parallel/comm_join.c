// Joining a run: see comm_join.h.
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

static int mpi_launched(void) {
    static const char *const set_by[] = {
        "OMPI_COMM_WORLD_SIZE", "PMIX_RANK",      "PMI_RANK", "PMI_SIZE",
        "MV2_COMM_WORLD_SIZE",  "MPI_LOCALNRANKS"
    };
    for (size_t i = 0; i < sizeof set_by / sizeof *set_by; i++)
        if (getenv(set_by[i])) return 1;
    return 0;
}

static void read_environment(void) {
    const char *size = setting("WORLD_SIZE", 0), *rank = setting("RANK", 0),
               *at = setting("MASTER_PORT", 0), *step = setting("SLURM_STEP_NUM_TASKS", 0);
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
        const char *nodes = setting("SLURM_STEP_NODELIST", "SLURM_NODELIST"),
                   *job = setting("SLURM_JOB_ID", 0);
        here.size = number("SLURM_STEP_NUM_TASKS", step);
        here.rank = number("SLURM_PROCID", getenv("SLURM_PROCID"));
        if (here.size > 1 && !nodes && !setting("MASTER_ADDR", 0))
            die("a Slurm step of %d tasks without SLURM_NODELIST|set MASTER_ADDR to the host of rank 0",
                here.size);
        if (setting("MASTER_ADDR", 0))
            snprintf(master, sizeof master, "%s", getenv("MASTER_ADDR"));
        else
            join_first_host(nodes ? nodes : "", master, sizeof master);
        port = at ? number("MASTER_PORT", at)
                  : 10000 + (job ? number("SLURM_JOB_ID", job) % 20000 : 0);
    } else
        return;
    if (here.size < 1 || here.rank >= here.size)
        die("rank %d of %d ranks, from the launcher's variables|RANK counts from 0 to WORLD_SIZE - 1",
            here.rank, here.size);
    if (here.size > 1) how = TCP;
}

static void abort_all(void) { join_abort(1); }

void join_init(int *argc, char ***argv) {
    (void)argc, (void)argv;
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
            die("started by an MPI launcher with %s ranks, but built without MPI|install MPI and build again, or start with torchrun or srun --mpi=none",
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
    uint64_t h = 0xcbf29ce484222325u;
    for (const char *p = text; *p; p++) h = (h ^ (unsigned char)*p) * 0x100000001b3u;
    return h;
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
    int32_t magic, rank, size, status;
    uint64_t machine;
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
        p += k, n -= (size_t)k;
    }
    return 1;
}
static int recv_bytes(int fd, void *bytes, size_t n) {
    for (char *p = (char *)bytes; n;) {
        ssize_t k = recv(fd, p, n, 0);
        if (k < 0 && errno == EINTR) continue;
        if (k <= 0) return 0;
        p += k, n -= (size_t)k;
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

static int listener(void) {
    int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1, off = 0, v4 = fd < 0;
    if (v4) fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in6 six;
    struct sockaddr_in four;
    memset(&six, 0, sizeof six), memset(&four, 0, sizeof four);
    six.sin6_family = AF_INET6, six.sin6_port = htons((uint16_t)port);
    four.sin_family = AF_INET, four.sin_port = htons((uint16_t)port);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (!v4) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(fd, v4 ? (struct sockaddr *)&four : (struct sockaddr *)&six,
             v4 ? sizeof four : sizeof six) ||
        listen(fd, 1024))
        die("rank 0 cannot listen at port %d: %s|another run on this machine? set MASTER_PORT to a free one, on all ranks",
            port, strerror(errno));
    return fd;
}

static void welcome_all(double until) {
    int fd = listener(), missing = here.size - 1;
    n_peers = here.size;
    peer = (int *)xmalloc((size_t)n_peers * sizeof *peer, "connections");
    for (int r = 0; r < n_peers; r++) peer[r] = -1;
    while (missing) {
        struct pollfd p = { fd, POLLIN, 0 };
        double left = until - now_seconds();
        if (left <= 0) {
            int r = 1;
            while (peer[r] >= 0) r++;
            die("%d of %d ranks did not come to %s:%d, the first is rank %d|start all of them; see whether they reach that address",
                missing, here.size, master, port, r);
        }
        if (poll(&p, 1, left < 1 ? 100 : 1000) <= 0) continue;
        int c = accept4(fd, 0, 0, SOCK_CLOEXEC);
        Hello h;
        if (c < 0) continue;
        limit_receive(c, 5); // what does not speak is not one of us
        if (!recv_bytes(c, &h, sizeof h) || h.magic != HELLO) {
            close(c);
            continue;
        }
        if (h.size != here.size || h.rank < 1 || h.rank >= here.size || peer[h.rank] >= 0)
            die("a process joins as rank %d of %d, this run has %d ranks%s|two runs share port %d, or the launcher's variables are mixed up",
                h.rank, h.size, here.size,
                h.rank > 0 && h.rank < here.size && peer[h.rank] >= 0 ? " and has that one" : "",
                port);
        limit_receive(c, 0);
        peer[h.rank] = c;
        machines[h.rank] = h.machine;
        missing--;
    }
    close(fd);
    Hello w = { WELCOME, 0, here.size, 0, machines[0] };
    for (int r = 1; r < n_peers; r++)
        must(send_bytes(peer[r], &w, sizeof w) &&
                 send_bytes(peer[r], machines, (size_t)here.size * sizeof *machines),
             r);
}

static int connect_once(const char **why) {
    struct addrinfo hints, *list, *a;
    char service[16];
    int fd = -1;
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    snprintf(service, sizeof service, "%d", port);
    int error = getaddrinfo(master, service, &hints, &list);
    if (error) {
        *why = gai_strerror(error);
        return -1;
    }
    for (a = list; a; a = a->ai_next) {
        fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
        if (fd >= 0 && !connect(fd, a->ai_addr, a->ai_addrlen)) break;
        *why = strerror(errno);
        if (fd >= 0) close(fd);
        fd = -1;
    }
    freeaddrinfo(list);
    return fd;
}

static void meet_rank_0(double until) {
    Hello h = { HELLO, here.rank, here.size, 0, machines[here.rank] }, w;
    const char *why = "";
    int fd, on = 1;
    while ((fd = connect_once(&why)) < 0) {
        if (now_seconds() > until)
            die("rank %d cannot reach rank 0 at %s:%d: %s|MASTER_ADDR and MASTER_PORT must name the host of rank 0; a firewall?",
                here.rank, master, port, why);
        nap();
    }
    double left = until - now_seconds();
    limit_receive(fd, left > 1 ? left + 1 : 2); // rank 0 knows who is missing: let it speak first
    if (!send_bytes(fd, &h, sizeof h) || !recv_bytes(fd, &w, sizeof w) || w.magic != WELCOME ||
        !recv_bytes(fd, machines, (size_t)here.size * sizeof *machines))
        die("rank 0 at %s:%d did not answer rank %d|its own message says why; or another program listens at that port",
            master, port, here.rank);
    limit_receive(fd, 0);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    peer = (int *)xmalloc(sizeof *peer, "connections");
    peer[0] = fd;
    n_peers = 1;
}

void join_connect(double timeout) {
    machines = (uint64_t *)xcalloc((size_t)here.size, sizeof *machines, "places of ranks");
    machines[here.rank] = this_machine();
    double until = now_seconds() + timeout;
    if (how == TCP && here.rank == 0)
        welcome_all(until);
    else if (how == TCP)
        meet_rank_0(until);
#ifdef MOE_MPI
    uint64_t mine = machines[here.rank];
    if (how == MPI) MPI_Allgather(&mine, 8, MPI_BYTE, machines, 8, MPI_BYTE, MPI_COMM_WORLD);
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

void join_leave(void) {
    char byte = 0;
    // Everybody says goodbye to rank 0, which answers when it has heard all: nobody's connection
    // closes while a watchdog still looks at it.
    if (peer && here.rank == 0) {
        for (int r = 1; r < n_peers; r++) must(recv_bytes(peer[r], &byte, 1), r);
        for (int r = 1; r < n_peers; r++) must(send_bytes(peer[r], &byte, 1), r);
    } else if (peer)
        must(send_bytes(peer[0], &byte, 1) && recv_bytes(peer[0], &byte, 1), 0);
    for (int i = 0; i < n_peers; i++)
        if (peer[i] >= 0) close(peer[i]);
    free(peer);
    peer = 0, n_peers = 0;
#ifdef MOE_MPI
    if (how == MPI) {
        MPI_Barrier(MPI_COMM_WORLD);
        MPI_Finalize();
    }
#endif
    free(machines);
    machines = 0, here.machine = 0;
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
