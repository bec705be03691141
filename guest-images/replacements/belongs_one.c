// A callback that was given the address of its site, marked as its own, as data. It counts in
// /proc/sys/kernel/panic how often it was given something else, which was meant for another callback or
// another site, and in /proc/sys/kernel/perf_event_mlock_kb how often it was right.
#include "../../patcher/include/stillpoint.h"

#ifndef OWN
#define OWN 1ul
STILLPOINT_CALLBACK(STILLPOINT_NO_REGISTERS | STILLPOINT_NMI);
#endif

extern int panic_timeout;
extern int sysctl_perf_event_mlock;

void stillpoint_callback(const struct stillpoint_args *args);

void stillpoint_callback(const struct stillpoint_args *args) {
    int right = args->data == (args->site ^ OWN << 48);
    __atomic_fetch_add(right ? &sysctl_perf_event_mlock : &panic_timeout, 1, __ATOMIC_RELAXED);
}
