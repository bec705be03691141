# The guest traces itself until the file /tmp/fire is gone: its function tracer, probes of its own and
# events of its own come and go.
cd /sys/kernel/tracing || exit
rest() {
    [ ! -e /tmp/fire ] || sleep 1
}
while [ -e /tmp/fire ]; do
    echo 'vfs_* do_sys_open* copy_process' >set_ftrace_filter
    echo function >current_tracer
    rest
    echo nop >current_tracer
    echo >set_ftrace_filter
    rest
    echo 'p:fire/theirs do_filp_open' >kprobe_events
    echo 'r:fire/returns vfs_write' >>kprobe_events
    for on in 1 0; do
        for event in fire/theirs fire/returns sched/sched_process_exec sched/sched_switch signal/signal_generate; do
            echo $on >events/$event/enable
        done
        rest
    done
    echo >kprobe_events
    echo >trace
    rest
done
