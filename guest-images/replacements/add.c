// A callback: adds what it is given to a number that the guest shows in /proc/sys/kernel/panic.
#include "../../patcher/include/stillpoint.h"

STILLPOINT_CALLBACK(STILLPOINT_NO_REGISTERS | STILLPOINT_NMI);

extern int panic_timeout;

void stillpoint_callback(const struct stillpoint_args *args);

void stillpoint_callback(const struct stillpoint_args *args) {
    __atomic_fetch_add(&panic_timeout, (int)args->data, __ATOMIC_RELAXED);
}
