// A callback that uses RCU, and counts in /proc/sys/kernel/panic how often RCU did not watch.
#include "../../patcher/include/stillpoint.h"

STILLPOINT_CALLBACK(STILLPOINT_NEEDS_RCU);

extern int panic_timeout;

_Bool rcu_is_watching(void);
void stillpoint_callback(const struct stillpoint_args *args);

void stillpoint_callback(const struct stillpoint_args *args) {
    (void)args;
    if (!rcu_is_watching())
        __atomic_fetch_add(&panic_timeout, 1, __ATOMIC_RELAXED);
}
