// SPDX-License-Identifier: GPL-2.0
// Calls a small function of the kernel in a loop and says how long that takes, with what the kernel's
// own tracers make of it and without.
//
//   echo HOW >/sys/module/probe_cost/parameters/measure
//   cat /sys/module/probe_cost/parameters/measure
//
// HOW is what is attached meanwhile: none, ftrace, ftrace-regs, kprobe (at its body; the kernel makes it
// a jump) or int3 (a kprobe of which it cannot). Ticks are those of the time stamp counter:
// instructions, where QEMU counts them (-icount shift=0).
#include <linux/delay.h>
#include <linux/ftrace.h>
#include <linux/jiffies.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/objtool.h>

MODULE_DESCRIPTION("What a probe costs");
MODULE_LICENSE("GPL");

// One `lea` of 8 bytes behind the tracer's nop, then a return: it changes no flags and no register but
// rax, and nobody calls it in a guest that has little to do.
#define FUNCTION "jiffies64_to_msecs"
#define FACTOR (MSEC_PER_SEC / HZ)

#define CALLS 1000
#define ROUNDS 25

enum { AX, BX, CX, DX, SI, DI, BP, R8, R9, R10, R11, R12, R13, R14, R15, FLAGS, COUNT };

// Calls the function with these registers and flags, and says what they are behind it. A stack pointer
// that is wrong shows soon enough.
asmlinkage void call_with(const unsigned long in[COUNT], unsigned long out[COUNT]);
asm(".text\n"
    ".type call_with, @function\n"
    "call_with:\n\t"
    "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n\t"
    "push %rsi\n\t"
    "mov 0*8(%rdi), %rax; mov 1*8(%rdi), %rbx; mov 2*8(%rdi), %rcx; mov 3*8(%rdi), %rdx\n\t"
    "mov 4*8(%rdi), %rsi; mov 6*8(%rdi), %rbp; mov 7*8(%rdi), %r8; mov 8*8(%rdi), %r9\n\t"
    "mov 9*8(%rdi), %r10; mov 10*8(%rdi), %r11; mov 11*8(%rdi), %r12; mov 12*8(%rdi), %r13\n\t"
    "mov 13*8(%rdi), %r14; mov 14*8(%rdi), %r15\n\t"
    "push 15*8(%rdi); mov 5*8(%rdi), %rdi; popf\n\t"
    "call " FUNCTION "\n\t"
    "pushf; push %rdi; mov 16(%rsp), %rdi\n\t"
    "pop 5*8(%rdi); pop 15*8(%rdi)\n\t"
    "mov %rax, 0*8(%rdi); mov %rbx, 1*8(%rdi); mov %rcx, 2*8(%rdi); mov %rdx, 3*8(%rdi)\n\t"
    "mov %rsi, 4*8(%rdi); mov %rbp, 6*8(%rdi); mov %r8, 7*8(%rdi); mov %r9, 8*8(%rdi)\n\t"
    "mov %r10, 9*8(%rdi); mov %r11, 10*8(%rdi); mov %r12, 11*8(%rdi); mov %r13, 12*8(%rdi)\n\t"
    "mov %r14, 13*8(%rdi); mov %r15, 14*8(%rdi)\n\t"
    "pop %rsi\n\t"
    "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp\n\t" ASM_RET
    ".size call_with, . - call_with\n");
STACK_FRAME_NON_STANDARD(call_with);

// Of the last measurement.
static struct {
    u64 ticks;            // of CALLS calls, the loop included
    unsigned long calls;  // that were made in all
    bool registers;       // as they should be behind the function
    bool flags;
    bool jump;            // a kprobe was made a jump
} found;

static notrace void traced(unsigned long ip, unsigned long parent, struct ftrace_ops *ops,
                           struct ftrace_regs *regs) {
}

static struct ftrace_ops plain = {.func = traced};
static struct ftrace_ops with_regs = {.func = traced, .flags = FTRACE_OPS_FL_SAVE_REGS};

static int probed(struct kprobe *probe, struct pt_regs *regs) {
    return 0;
}
NOKPROBE_SYMBOL(probed);

static void stepped(struct kprobe *probe, struct pt_regs *regs, unsigned long flags) {
}
NOKPROBE_SYMBOL(stepped);

static struct kprobe kprobe;

// None of the flags that arithmetic makes is set, all are, or one.
static void check(void) {
    static const unsigned long patterns[] = {0, 0x8d5, 0x1, 0x4, 0x10, 0x40, 0x80, 0x800};
    unsigned long in[COUNT], out[COUNT];
    int pattern, i;

    found.registers = found.flags = true;
    for (pattern = 0; pattern < ARRAY_SIZE(patterns); pattern++) {
        for (i = 0; i < FLAGS; i++)
            in[i] = 0x0123456789abcdefUL * (unsigned long)(pattern * COUNT + i + 1);
        in[FLAGS] = (native_save_fl() & ~0x8d5UL) | patterns[pattern];
        memset(out, 0, sizeof out);
        call_with(in, out);
        found.calls++;
        found.flags &= out[FLAGS] == in[FLAGS];
        in[AX] = in[DI] * FACTOR;
        found.registers &= !memcmp(in, out, FLAGS * sizeof in[0]);
    }
}

static noinline void loop(void) {
    unsigned long flags;
    int round, i;
    u64 ticks;

    found.ticks = ~0ULL;
    for (round = 0; round < ROUNDS; round++) {
        local_irq_save(flags);
        ticks = rdtsc_ordered();
        for (i = 0; i < CALLS; i++)
            jiffies64_to_msecs(i);
        ticks = rdtsc_ordered() - ticks;
        local_irq_restore(flags);
        found.calls += CALLS;
        // Whatever the host does meanwhile only adds to it.
        found.ticks = min(found.ticks, ticks);
    }
}

static void measure(void) {
    unsigned long flags;

    loop();
    local_irq_save(flags);
    check();
    local_irq_restore(flags);
}

static int with_ftrace(struct ftrace_ops *ops) {
    int error = ftrace_set_filter(ops, FUNCTION, sizeof FUNCTION - 1, 1);

    error = error ?: register_ftrace_function(ops);
    if (error)
        return error;
    measure();
    return unregister_ftrace_function(ops);
}

// Where the tracer's nop ends: in front of it there may be an `endbr64`.
static unsigned int body(void) {
    static const u8 nop[] = {0x0f, 0x1f, 0x44, 0, 0};

    return memcmp(jiffies64_to_msecs, nop, sizeof nop) ? 4 + sizeof nop : sizeof nop;
}

static bool is_jump(void) {
    return READ_ONCE(*kprobe.addr) == 0xe9;
}

static int with_kprobe(bool step) {
    int error, tries;

    memset(&kprobe, 0, sizeof kprobe);
    kprobe.symbol_name = FUNCTION;
    kprobe.pre_handler = probed;
    kprobe.post_handler = step ? stepped : NULL;
    kprobe.offset = body();
    error = register_kprobe(&kprobe);
    if (error)
        return error;
    // A worker of the kernel's makes it a jump a little later.
    for (tries = 0; tries < (step ? 10 : 100) && !is_jump(); tries++)
        msleep(20);
    measure();
    found.jump = is_jump();
    unregister_kprobe(&kprobe);
    return 0;
}

static int measure_with(const char *how, const struct kernel_param *param) {
    memset(&found, 0, sizeof found);
    if (sysfs_streq(how, "ftrace"))
        return with_ftrace(&plain);
    if (sysfs_streq(how, "ftrace-regs"))
        return with_ftrace(&with_regs);
    if (sysfs_streq(how, "kprobe"))
        return with_kprobe(false);
    if (sysfs_streq(how, "int3"))
        return with_kprobe(true);
    if (!sysfs_streq(how, "none"))
        return -EINVAL;
    measure();
    return 0;
}

static int tell(char *text, const struct kernel_param *param) {
    return sysfs_emit(text, "loop %u ticks %llu calls %lu registers %d flags %d jump %d\n", CALLS,
                      found.ticks, found.calls, found.registers, found.flags, found.jump);
}

static const struct kernel_param_ops ops = {.set = measure_with, .get = tell};
module_param_cb(measure, &ops, NULL, 0600);

static int __init begin(void) {
    return 0;
}

static void __exit end(void) {
}

module_init(begin);
module_exit(end);
