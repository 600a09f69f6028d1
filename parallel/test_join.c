// Joining without MPI: processes of this machine that meet over TCP, by torchrun's variables and by
// Slurm's, and what happens when one does not come or goes away.
//   test_join [PORT]          forks its ranks; prints "N passed, M failed", exit status 1 if any
//   failed. PORT and the 31 above must be free (default 29700)
#define _GNU_SOURCE
#include "comm_join.h"
#include "../kernels/fail.h"
#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static int passed, failed, port = 29700;
static void check(int ok, const char *what) {
    if (ok) {
        passed++;
        return;
    }
    failed++;
    printf("FAIL %s\n", what);
}

static void set(const char *name, long value) {
    char text[32];
    snprintf(text, sizeof text, "%ld", value);
    setenv(name, text, 1);
}
static void as_torchrun(int rank, int size) {
    set("RANK", rank);
    set("WORLD_SIZE", size);
    set("MASTER_PORT", port);
    setenv("MASTER_ADDR", "localhost", 1);
}
static void as_slurm(int rank, int size) {
    char host[200], list[256];
    gethostname(host, sizeof host);
    snprintf(list, sizeof list, "%s,other[01-03]", host);
    set("SLURM_PROCID", rank);
    set("SLURM_STEP_NUM_TASKS", size);
    set("SLURM_JOB_ID", 40000 + port - 10000); // job id mod 20000 + 10000 = port
    setenv("SLURM_STEP_NODELIST", list, 1);
    setenv("MASTER_ADDR", "127.0.0.1",
           1); // the machine's own name need not resolve where this test runs
}

// ---- what a rank does; the exit status says how it went -------------------------------------
static int all_meet(int rank, int size) {
    join_init(0, 0);
    const Joined *j = joined();
    if (j->rank != rank || j->size != size) return 2;
    join_connect(20);
    if (j->local_rank != rank || j->local_size != size) return 3;
    for (int round = 0; round < 3; round++) {
        char text[5000];
        for (int i = 0; i < 5000; i++) text[i] = (char)(rank == 0 ? i * 7 + round : 0);
        join_broadcast(text, sizeof text);
        for (int i = 0; i < 5000; i++)
            if (text[i] != (char)(i * 7 + round)) return 4;
    }
    if (join_lost() != -1) return 5;
    if (rank == size - 1) usleep(300000);
    join_leave();
    return 0;
}
static int one_missing(int rank, int size) {
    if (rank == size - 1) return 0;
    join_init(0, 0);
    join_connect(1.5);
    return 6; // nobody may come this far
}
static int one_goes(
    int rank, int size) { // the last one dies; rank 0 sees it and ends, then the others see that
    join_init(0, 0);
    join_connect(20);
    if (rank == size - 1) raise(SIGKILL);
    for (int i = 0; i < 100; i++, usleep(50000)) {
        int gone = join_lost();
        int expected = rank ? 0 : size - 1;
        if (gone >= 0) return gone == expected ? 0 : 7;
    }
    return 8;
}
static int two_alike(int rank, int size) {
    set("RANK", rank == size - 1 ? 1 : rank);
    join_init(0, 0);
    join_connect(3);
    return 9;
}

// ---- strangers: they come first, and the ranks must meet all the same ------------------------
static int connect_to(const char *address) {
    struct sockaddr_in to;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(&to, 0, sizeof to);
    to.sin_family = AF_INET;
    to.sin_port = htons((uint16_t)port);
    inet_pton(AF_INET, address, &to.sin_addr);
    if (!connect(fd, (struct sockaddr *)&to, sizeof to)) return fd;
    close(fd);
    return -1;
}
// Twenty that stay silent, twenty that send garbage, and one of a run with another name.
static void strangers(void) {
    int fd;
    char garbage[200];
    memset(garbage, 'x', sizeof garbage);
    while ((fd = connect_to("127.0.0.1")) < 0) usleep(10000);
    for (int i = 0; i < 20; i++) connect_to("127.0.0.1");
    for (int i = 0; i < 20; i++)
        if (send(connect_to("127.0.0.1"), garbage, 1 + (size_t)i * 7, MSG_NOSIGNAL) < 0) _exit(1);
    if (!freopen("/dev/null", "w", stderr)) _exit(1);
    setenv("MOE_RUN_ID", "another run", 1);
    as_torchrun(1, 4);
    join_init(0, 0);
    join_connect(2); // does not come back
    _exit(1);
}
static int among_strangers(int rank, int size) {
    setenv("MOE_RUN_ID", "this run", 1);
    pid_t stranger = 0;
    if (rank == 0 && (stranger = fork()) == 0) strangers();
    if (rank > 0) usleep(1000000); // the strangers come first
    double since = now_seconds();
    join_init(0, 0);
    join_connect(20);
    double met_after = now_seconds() - since;
    // Nobody waited for a stranger.
    if (stranger) kill(stranger, SIGKILL);
    if (stranger) waitpid(stranger, 0, 0);
    if (joined()->local_size != size || met_after > 4) return 10;
    join_leave();
    return 0;
}
// Rank 1 looks whether rank 0 listens at another address of this machine than the one it was given.
static int at_one_address(int rank, int size) {
    (void)size;
    if (rank == 1) usleep(500000);
    int elsewhere = rank == 1 ? connect_to("127.0.0.2") : -1;
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    join_init(0, 0);
    join_connect(20);
    join_leave();
    return elsewhere >= 0 ? 11 : 0;
}

// Runs n ranks; status[r] = what waitpid says.
static void ranks(int n, void (*environment)(int, int), int (*work)(int, int), int quiet,
                  int *status) {
    pid_t child[16];
    port++;
    fflush(stdout);
    for (int r = 0; r < n; r++)
        if ((child[r] = fork()) == 0) {
            if (quiet && !freopen("/dev/null", "w", stderr)) _exit(20);
            if (n > 1) environment(r, n);
            _exit(work(r, n));
        }
    for (int r = 0; r < n; r++) waitpid(child[r], &status[r], 0);
}
static int all_are(const int *status, int n, int code) {
    int ok = 1;
    for (int r = 0; r < n; r++) ok &= WIFEXITED(status[r]) && WEXITSTATUS(status[r]) == code;
    return ok;
}

static int first_host_is(const char *list, const char *want) {
    char name[64];
    join_first_host(list, name, sizeof name);
    return !strcmp(name, want);
}

int main(int argc, char **argv) {
    static const char *const launcher[] = {
        "OMPI_COMM_WORLD_SIZE", "PMIX_RANK",      "PMI_RANK", "PMI_SIZE",
        "MV2_COMM_WORLD_SIZE",  "MPI_LOCALNRANKS"
    };
    for (size_t i = 0; i < sizeof launcher / sizeof *launcher; i++) unsetenv(launcher[i]);
    if (argc > 1) port = atoi(argv[1]);
    int status[16];
    ranks(1, 0, all_meet, 0, status);
    check(all_are(status, 1, 0), "one process");
    for (int n = 2; n <= 9; n += 7) {
        ranks(n, as_torchrun, all_meet, 0, status);
        check(all_are(status, n, 0), "torchrun's variables");
        ranks(n, as_slurm, all_meet, 0, status);
        check(all_are(status, n, 0), "Slurm's variables");
    }
    ranks(3, as_torchrun, one_missing, 1, status);
    check(all_are(status, 2, 1), "a rank that does not come ends the others");
    ranks(4, as_torchrun, one_goes, 0, status);
    check(all_are(status, 3, 0) && WIFSIGNALED(status[3]), "a rank that is gone is noticed by all");
    ranks(3, as_torchrun, two_alike, 1, status);
    check(all_are(status, 3, 1), "two processes of one rank");
    ranks(4, as_torchrun, among_strangers, 0, status);
    check(all_are(status, 4, 0), "strangers who are silent, send garbage or are of another run");
    ranks(2, as_torchrun, at_one_address, 0, status);
    check(all_are(status, 2, 0), "rank 0 listens at the ranks' address alone");
    check(first_host_is("node7", "node7") && first_host_is("a1,b2", "a1"), "plain node lists");
    check(first_host_is("gpu[03-07,9],login", "gpu03") && first_host_is("n[12,15]", "n12") &&
              first_host_is("r1-c[2-3]-x[04],z", "r1-c2-x04"),
          "node lists with ranges");
    printf("test_join: %d passed, %d failed\n", passed, failed);
    return failed > 0;
}
