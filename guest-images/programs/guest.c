// What tests need inside a guest beside busybox: one program, its first argument says what. SIGTERM
// ends it as if its time were over.
//
//   guest spin SECONDS              keeps one CPU busy in user mode
//   guest calls SECONDS             keeps every CPU busy in the kernel (getppid)
//   guest threads COUNT             that many threads that sleep for ever
//   guest zombie                    a child that has ended and is not asked for its status
//   guest read FILE SECONDS TEXT... reads FILE over and over on every CPU and counts what it holds:
//                                   prints, for each CPU, how often each TEXT was in it, and how
//                                   often none was
//   guest stall SECONDS             largest gap between two reads of the time stamp counter
//   guest epolls DEPTH              that many event polls in a row, each with the one before in it
//   guest store ADDRESS HOW VALUE   writes to physical memory through /dev/mem; HOW is the
//                                   instruction: mov, lock, movs, sse, movq, fist, avx, cx16, fxsave
//   guest load ADDRESS              reads 8 bytes of physical memory
//   guest kexec KERNEL INITRD TEXT  starts another kernel
//   guest reads FILE COUNT          reads a file so often, and tells how often it said the same
//   guest traps COUNT               runs under the trap flag until COUNT single-step traps came
//   guest int3 COUNT                runs into so many breakpoints of its own, and tells how many
//                                   signals told the right address
//   guest membarrier                returns when an RCU grace period has passed
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define MOST 16

static void die(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static uint64_t tsc(void) {
    uint32_t low, high;
    __asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (uint64_t)high << 32 | low;
}

static volatile double end;

static void finish(int signal) {
    (void)signal;
    end = 0;
}

// Runs `work` once on each CPU, at the same time.
static void on_every_cpu(void *(*work)(void *)) {
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    pthread_t threads[cpus];
    for (long cpu = 0; cpu < cpus; cpu++) {
        cpu_set_t set;
        pthread_attr_t attr;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        pthread_attr_init(&attr);
        pthread_attr_setaffinity_np(&attr, sizeof set, &set);
        if (pthread_create(&threads[cpu], &attr, work, (void *)cpu))
            die("pthread_create");
    }
    for (long cpu = 0; cpu < cpus; cpu++)
        pthread_join(threads[cpu], NULL);
}

static void *call(void *cpu) {
    unsigned long calls = 0;
    while (now() < end)
        for (int i = 0; i < 1000; i++, calls++)
            syscall(SYS_getppid);
    printf("cpu %ld: %lu calls\n", (long)cpu, calls);
    return NULL;
}

static void *sleep_on(void *nothing) {
    for (;;)
        pause();
    return nothing;
}

static void threads(int count) {
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 64 << 10);
    for (int i = 1; i < count; i++) {
        pthread_t thread;
        if (pthread_create(&thread, &attr, sleep_on, NULL))
            die("pthread_create");
    }
    printf("%d threads\n", count);
    sleep_on(NULL);
}

static void zombie(void) {
    pid_t child = fork();
    if (child == 0)
        _exit(0);
    siginfo_t info;
    waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT);
    printf("zombie %d\n", (int)child);
    sleep_on(NULL);
}

static const char *file;
static char **texts;
static int text_count;

static void *read_over_and_over(void *cpu) {
    unsigned long seen[MOST + 1] = {0};
    int fd = open(file, O_RDONLY);
    if (fd < 0)
        die(file);
    while (now() < end) {
        char text[4097];
        ssize_t n = pread(fd, text, sizeof text - 1, 0);
        if (n < 0)
            die(file);
        text[n] = 0;
        int i = 0;
        while (i < text_count && !strstr(text, texts[i]))
            i++;
        if (i == text_count && !seen[MOST])
            printf("cpu %ld: unexpected: %s\n", (long)cpu, text);
        seen[i == text_count ? MOST : i]++;
    }
    char line[512];
    int at = snprintf(line, sizeof line, "cpu %ld:", (long)cpu);
    for (int i = 0; i < text_count; i++)
        at += snprintf(line + at, sizeof line - (size_t)at, " %lu", seen[i]);
    printf("%s none %lu\n", line, seen[MOST]);
    return NULL;
}

static void stall(void) {
    uint64_t longest = 0, first = tsc(), last = first;
    double begin = now(), stop = end;
    // The clock is looked at now and then: that itself takes time in a nested guest.
    for (unsigned i = 1;; i++) {
        uint64_t t = tsc();
        if (t - last > longest)
            longest = t - last;
        last = t;
        if (i % 4096 == 0) {
            if (now() > stop)
                break;
            last = tsc();
        }
    }
    double hz = (double)(last - first) / (now() - begin);
    printf("longest gap: %lu cycles, %.0f us at %.0f MHz\n", (unsigned long)longest,
           (double)longest / hz * 1e6, hz / 1e6);
}

static void epolls(int depth) {
    int inner = epoll_create1(0);
    for (int i = 1; i < depth; i++) {
        int outer = epoll_create1(0);
        struct epoll_event event = {.events = EPOLLIN};
        if (epoll_ctl(outer, EPOLL_CTL_ADD, inner, &event))
            die("epoll_ctl");
        inner = outer;
    }
    printf("%d epolls\n", depth);
}

static volatile uint8_t *physical(uint64_t address, int protection) {
    long page = sysconf(_SC_PAGESIZE);
    int fd = open("/dev/mem", O_RDWR | O_SYNC);
    if (fd < 0)
        die("/dev/mem");
    uint8_t *at = mmap(NULL, 2 * (size_t)page, protection, MAP_SHARED, fd,
                       (off_t)(address & ~(uint64_t)(page - 1)));
    if (at == MAP_FAILED)
        die("mmap of /dev/mem");
    return at + (address & (uint64_t)(page - 1));
}

static void store(uint64_t address, const char *how, uint64_t value) {
    volatile uint8_t *at = physical(address, PROT_READ | PROT_WRITE);
    static uint64_t from[64] __attribute__((aligned(64)));
    for (int i = 0; i < 64; i++)
        from[i] = value;
    if (!strcmp(how, "mov")) {
        __asm__ volatile("mov %1, (%0)" ::"r"(at), "r"(value) : "memory");
    } else if (!strcmp(how, "lock")) {
        __asm__ volatile("lock xor %1, (%0)" ::"r"(at), "r"(value) : "memory");
    } else if (!strcmp(how, "movs")) {
        void *to = (void *)at;
        const void *source = from;
        unsigned long count = 32;
        __asm__ volatile("rep movsb" : "+D"(to), "+S"(source), "+c"(count)::"memory");
    } else if (!strcmp(how, "sse")) {
        __asm__ volatile("movups (%1), %%xmm0; movups %%xmm0, (%0)" ::"r"(at), "r"(from)
                         : "xmm0", "memory");
    } else if (!strcmp(how, "movq")) {
        __asm__ volatile("movq (%1), %%xmm0; movq %%xmm0, (%0)" ::"r"(at), "r"(from)
                         : "xmm0", "memory");
    } else if (!strcmp(how, "fist")) {
        __asm__ volatile("fildll (%1); fistpll (%0)" ::"r"(at), "r"(from) : "st", "memory");
    } else if (!strcmp(how, "avx")) {
        __asm__ volatile("vmovups (%1), %%ymm0; vmovups %%ymm0, (%0); vzeroupper" ::"r"(at),
                         "r"(from)
                         : "xmm0", "memory");
    } else if (!strcmp(how, "cx16")) {
        uint64_t low = value, high = value;
        __asm__ volatile("lock cmpxchg16b (%2)"
                         : "+a"(low), "+d"(high)
                         : "r"(at), "b"(value), "c"(value)
                         : "memory", "cc");
    } else if (!strcmp(how, "fxsave")) {
        __asm__ volatile("fxsave64 (%0)" ::"r"(at) : "memory");
    } else {
        fprintf(stderr, "guest store: unknown instruction %s\n", how);
        exit(2);
    }
}

static void load_kernel(const char *kernel, const char *initrd, const char *text) {
    int kernel_fd = open(kernel, O_RDONLY), initrd_fd = open(initrd, O_RDONLY);
    if (kernel_fd < 0 || initrd_fd < 0)
        die("kexec");
    if (syscall(SYS_kexec_file_load, kernel_fd, initrd_fd, strlen(text) + 1, text, 0UL))
        die("kexec_file_load");
    sync();
    syscall(SYS_reboot, 0xfee1dead, 672274793, 0x45584543, NULL);
    die("reboot");
}

static void reads(const char *from, unsigned long count) {
    char first[4096], text[4096];
    int fd = open(from, O_RDONLY);
    ssize_t length = fd < 0 ? -1 : pread(fd, first, sizeof first, 0);
    if (length < 0)
        die(from);
    unsigned long same = 0;
    for (unsigned long i = 0; i < count; i++) {
        ssize_t n = pread(fd, text, sizeof text, 0);
        same += n == length && !memcmp(first, text, (size_t)n);
    }
    printf("%lu the same\n", same);
}

#define TRAP_FLAG 0x100

static volatile unsigned long traps_left, traps_seen;
extern const char behind_int3[];

static void trapped(int signal, siginfo_t *info, void *context) {
    (void)signal;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    if (info->si_code == TRAP_TRACE)
        traps_seen++;
    if (!--traps_left)
        registers[REG_EFL] &= ~TRAP_FLAG;
}

static void broke(int signal, siginfo_t *info, void *context) {
    (void)signal;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    // SI_KERNEL: from a breakpoint.
    if (info->si_code == SI_KERNEL && registers[REG_RIP] == (greg_t)behind_int3)
        traps_seen++;
}

static void catch (void (*handler)(int, siginfo_t *, void *)) {
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO};
    if (sigaction(SIGTRAP, &action, NULL))
        die("sigaction");
}

static void traps(unsigned long count) {
    traps_left = count;
    catch (trapped);
    __asm__ volatile("pushf; orl %0, (%%rsp); popf" ::"i"(TRAP_FLAG) : "memory", "cc");
    while (traps_left) {
    }
    printf("%lu traps\n", traps_seen);
}

static __attribute__((noinline, noclone)) void breakpoint(void) {
    __asm__ volatile("int3; .globl behind_int3; behind_int3:" ::: "memory");
}

static void breakpoints(unsigned long count) {
    catch (broke);
    for (unsigned long i = 0; i < count; i++)
        breakpoint();
    printf("%lu breakpoints\n", traps_seen);
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    signal(SIGTERM, finish);
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (!strcmp(what, "spin") && argc == 3) {
        for (end = now() + atof(argv[2]); now() < end;)
            for (volatile int i = 0; i < 100000; i++) {
            }
    } else if (!strcmp(what, "calls") && argc == 3) {
        end = now() + atof(argv[2]);
        on_every_cpu(call);
    } else if (!strcmp(what, "threads") && argc == 3) {
        threads(atoi(argv[2]));
    } else if (!strcmp(what, "zombie") && argc == 2) {
        zombie();
    } else if (!strcmp(what, "read") && argc >= 5 && argc - 4 <= MOST) {
        file = argv[2];
        end = now() + atof(argv[3]);
        texts = argv + 4;
        text_count = argc - 4;
        on_every_cpu(read_over_and_over);
    } else if (!strcmp(what, "stall") && argc == 3) {
        end = now() + atof(argv[2]);
        stall();
    } else if (!strcmp(what, "epolls") && argc == 3) {
        epolls(atoi(argv[2]));
    } else if (!strcmp(what, "store") && argc == 5) {
        store(strtoull(argv[2], NULL, 0), argv[3], strtoull(argv[4], NULL, 0));
    } else if (!strcmp(what, "load") && argc == 3) {
        printf("0x%016lx\n", *(volatile uint64_t *)physical(strtoull(argv[2], NULL, 0), PROT_READ));
    } else if (!strcmp(what, "reads") && argc == 4) {
        reads(argv[2], strtoul(argv[3], NULL, 0));
    } else if (!strcmp(what, "traps") && argc == 3) {
        traps(strtoul(argv[2], NULL, 0));
    } else if (!strcmp(what, "int3") && argc == 3) {
        breakpoints(strtoul(argv[2], NULL, 0));
    } else if (!strcmp(what, "membarrier") && argc == 2) {
        // MEMBARRIER_CMD_GLOBAL.
        if (syscall(SYS_membarrier, 1, 0, 0))
            die("membarrier");
    } else if (!strcmp(what, "kexec") && argc == 5) {
        load_kernel(argv[2], argv[3], argv[4]);
    } else {
        fprintf(stderr, "guest: see programs/guest.c\n");
        return 2;
    }
    return 0;
}
