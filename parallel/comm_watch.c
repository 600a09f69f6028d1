// The watchdog of a transport: see comm_common.h. One thread a rank; it sleeps until the running
// wait is older than the time limit, reports, and ends the run.
#define _POSIX_C_SOURCE 200809L
#include "comm_common.h"
#include "../kernels/fail.h"
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static struct {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int running, stop, rank, may_abort;
    void (*abort_all)(int status);
    void (*report)(const void *context, char *text,
                   size_t size); // of the wait in progress, 0 = none
    const void *context;
    double since;
    int (*poll)(char *text, size_t size);
} watch = { .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };

void watch_lock(void) { pthread_mutex_lock(&watch.lock); }
void watch_unlock(void) { pthread_mutex_unlock(&watch.lock); }

static void end_run(double waited) {
    char text[2048] = "";
    watch.report(watch.context, text, sizeof text);
    die_claim();
    fflush(stdout);
    fprintf(
        stderr,
        "error: rank %d waited %.1f s (--timeout %g): %s  hint: see whether the ranks named still run; a slow one needs a larger --timeout\n",
        watch.rank, waited, comm_options.timeout, text);
    fflush(stderr);
    alarm(5); // should the transport be stuck too, the signal ends this process and the launcher
              // the others
    if (watch.may_abort) watch.abort_all(1);
    _exit(1);
}

static void end_polled(const char *text) {
    die_claim();
    fflush(stdout);
    fprintf(stderr, "error: rank %d: %s\n", watch.rank, text);
    fflush(stderr);
    alarm(5);
    if (watch.may_abort) watch.abort_all(1);
    _exit(1);
}

// Sleeps on the condition for at most `seconds`.
static void sleep_locked(double seconds) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    int64_t ns = until.tv_nsec + (int64_t)(seconds * 1e9);
    until.tv_sec += (time_t)(ns / 1000000000);
    until.tv_nsec = (long)(ns % 1000000000);
    pthread_cond_timedwait(&watch.changed, &watch.lock, &until);
}

static void *watch_loop(void *unused) {
    (void)unused;
    // Ranks that wait for the same one run out of time together: each gives the lower ones a
    // moment, so that usually one report appears.
    double patience = 0.15 * (watch.rank < 10 ? watch.rank : 10);
    pthread_mutex_lock(&watch.lock);
    while (!watch.stop) {
        double limit = comm_options.timeout,
               waited = watch.report ? now_seconds() - watch.since : 0;
        if (watch.report && waited > limit + patience) end_run(waited);
        double left = watch.report ? limit + patience - waited
                                   : limit; // a wait that begins now cannot be over before `limit`
        char text[1024];
        if (watch.poll)
            alarm((unsigned)(limit < 1e6 ? limit : 1e6) +
                  60); // should the driver hold this thread too, the signal ends the process
        if (watch.poll && watch.poll(text, sizeof text)) end_polled(text);
        if (watch.poll) alarm(0);
        if (watch.poll && left > 0.5) left = 0.5;
        sleep_locked(left < 0.02 ? 0.02 : left);
    }
    pthread_mutex_unlock(&watch.lock);
    return 0;
}

void watch_start(int rank, int threads_multiple, void (*abort_all)(int status)) {
    if (comm_options.timeout <= 0 || watch.running) return;
    watch.rank = rank;
    watch.may_abort = threads_multiple;
    watch.abort_all = abort_all;
    // Signals (save and go on, save and stop) belong to the main thread.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&watch.thread, 0, watch_loop, 0))
        die("cannot start the watchdog's thread|raise the limit on processes (ulimit -u)");
    pthread_sigmask(SIG_SETMASK, &before, 0);
    watch.running = 1;
}

void watch_stop(void) {
    if (!watch.running) return;
    pthread_mutex_lock(&watch.lock);
    watch.stop = 1;
    pthread_cond_signal(&watch.changed);
    pthread_mutex_unlock(&watch.lock);
    pthread_join(watch.thread, 0);
    watch.running = 0;
    watch.stop = 0;
}

void watch_poll(int (*poll)(char *text, size_t size)) {
    pthread_mutex_lock(&watch.lock);
    watch.poll = poll;
    pthread_cond_signal(&watch.changed);
    pthread_mutex_unlock(&watch.lock);
}

void watch_enter(void (*report)(const void *context, char *text, size_t size),
                 const void *context) {
    double now = now_seconds();
    pthread_mutex_lock(&watch.lock);
    watch.since = now;
    watch.context = context;
    watch.report = report;
    pthread_mutex_unlock(&watch.lock);
}

void watch_leave(void) {
    pthread_mutex_lock(&watch.lock);
    watch.report = 0;
    pthread_mutex_unlock(&watch.lock);
}
