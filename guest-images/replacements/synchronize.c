// A callback that waits as the kernel's own users of trampolines do before they free one
// (kernel/trace/ftrace.c, ftrace_shutdown()): for what is measured beside ours.
#include "../../patcher/include/stillpoint.h"

STILLPOINT_CALLBACK(STILLPOINT_MAY_SLEEP);

void synchronize_rcu_tasks(void);
void synchronize_rcu_tasks_rude(void);
void stillpoint_callback(const struct stillpoint_args *args);

void stillpoint_callback(const struct stillpoint_args *args) {
    (void)args;
    synchronize_rcu_tasks_rude();
    synchronize_rcu_tasks();
}
