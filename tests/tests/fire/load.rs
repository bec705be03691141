//! What the guest does meanwhile.

use stillpoint_tests::{Failure, Guest, TestResult};

/// The guest traces itself: its function tracer, a probe of its own and events of its own come and go.
/// It ends when the file `/tmp/fire` is gone.
const TRACES_ITSELF: &str = "\
cd /sys/kernel/tracing
while [ -e /tmp/fire ]; do
    echo 'vfs_* do_sys_open* copy_process' >set_ftrace_filter
    echo function >current_tracer
    sleep 0.2
    echo nop >current_tracer
    echo >set_ftrace_filter
    echo 'p:fire/theirs do_filp_open' >kprobe_events
    echo 'r:fire/returns vfs_write' >>kprobe_events
    for on in 1 0; do
        for event in fire/theirs fire/returns sched/sched_process_exec sched/sched_switch signal/signal_generate; do
            echo $on >events/$event/enable
        done
        sleep 0.1
    done
    echo >kprobe_events
    echo >trace
done 2>/tmp/traced
";

/// Begins it.
pub(crate) fn begin(guest: &Guest, seconds: u64, workers: u32) -> TestResult {
    guest.sh(": >/tmp/fire")?;
    guest.sh(&format!(
        "storm {seconds} {workers} >/tmp/storm 2>&1 & echo $! >/tmp/storm.pid"
    ))?;
    guest.sh(&format!(
        "cat >/tmp/traces <<'EOF'\n{TRACES_ITSELF}EOF\n(sh /tmp/traces; : >/tmp/traced.done) >/dev/null 2>&1 &"
    ))?;
    Ok(())
}

/// Ends it, and tells what was done.
pub(crate) fn end(guest: &Guest) -> Result<String, Failure> {
    guest.sh("rm /tmp/fire; kill $(cat /tmp/storm.pid)")?;
    guest.sh("until [ -e /tmp/traced.done ] && grep -q rounds /tmp/storm; do sleep 0.1; done")?;
    let traced = guest.sh("sort /tmp/traced | uniq -c")?;
    let said = guest.sh("rm /tmp/traced.done; cat /tmp/storm")?;
    if !said.contains(" 0 wrong") {
        return Err(Failure::new(format!("the guest went wrong: {said}")));
    }
    if !traced.trim().is_empty() {
        println!("under fire: the guest's own tracing was refused: {}", traced.trim());
    }
    Ok(said.trim().trim_start_matches("storm: ").to_owned())
}
