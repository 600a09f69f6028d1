// The transport of a program built for one process (transport.h): there is nobody to send to, and
// comm.c copies what a group of one sends to itself.
#include "transport.h"
#include "../kernels/fail.h"
#include <stdlib.h>

static void end_process(void) { exit(1); }

void transport_init(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    die_set(0, end_process);
}

void transport_start(void) {
    check_alone("this program was built without MPI: build with it (make doctor says how), or "
                "start one process");
}

World transport_world(void) {
    World alone = { 0, 1, 0, 1 };
    return alone;
}

void transport_group(Comm *g, const char *name) {
    (void)g;
    (void)name;
}

const char *transport_describe(void) { return "none"; }
int transport_forces(void) { return 0; }
int transport_stages_on_device(void) { return 1; }
void transport_group_free(Comm *g) { (void)g; }
void transport_leave(void) {}
void transport_finish(void) {}
void transport_abort(int status) { exit(status); }

// All groups are local: comm.c never comes here.
static void nobody(void) { die("a message to another rank in a program built without MPI|a bug"); }

void transport_post(Call *c, int slot) {
    (void)c;
    (void)slot;
    nobody();
}

void transport_wait(Call *c, int slot) {
    (void)c;
    (void)slot;
    nobody();
}

void transport_host(Comm *g, const CallRecord *r, void *recv, const void *send, size_t bytes,
                    int root) {
    (void)g;
    (void)r;
    (void)recv;
    (void)send;
    (void)bytes;
    (void)root;
    nobody();
}
