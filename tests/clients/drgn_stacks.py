"""Unwinds every task of a memory dump with drgn and prints a line of JSON for each: its task_struct,
pid, name, and the addresses of its frames in the kernel.

drgn_stacks.py DUMP VMLINUX: VMLINUX holds the debugging symbols.
"""

import json
import sys

import drgn
from drgn.helpers.linux.percpu import per_cpu
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.pid import for_each_task

KERNEL_HALF = 1 << 63

program = drgn.Program()
program.set_core_dump(sys.argv[1])
program.load_debug_info([sys.argv[2]])


def frames(task):
    try:
        trace = program.stack_trace(task)
    except ValueError as error:
        return str(error)
    # What was inlined has no frame of its own, and user mode is not the kernel's.
    return [frame.pc for frame in trace if not frame.is_inline and frame.pc >= KERNEL_HALF]


tasks = list(for_each_task(program))
tasks += [per_cpu(program["runqueues"], cpu).idle for cpu in for_each_online_cpu(program)]
for task in tasks:
    print(json.dumps({
        "address": task.value_(),
        "pid": task.pid.value_(),
        "comm": task.comm.string_().decode(),
        "frames": frames(task),
    }))
