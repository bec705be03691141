// Keeps a guest as busy as it can be in as many ways: processes that fork, start programs, sleep, fault
// pages in, get signals from timers and from each other, talk through pipes and read files of /proc.
//
//   storm SECONDS WORKERS
//
// It checks what it does: at the end, or when SIGTERM comes, it prints how many rounds were made and how
// many went wrong.
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define PAGES 32

struct counts {
    unsigned long rounds, wrong;
};

static struct counts *all;
static volatile sig_atomic_t over, signals;
static uint64_t state;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void finish(int signal) {
    (void)signal;
    over = 1;
}

static void count(int signal) {
    (void)signal;
    signals++;
}

static unsigned pick(unsigned below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (unsigned)(state >> 33) % below;
}

static void rest(long nanoseconds) {
    struct timespec t = {.tv_nsec = nanoseconds};
    nanosleep(&t, NULL);
}

// The status that a child ends with.
static int ends(pid_t child) {
    int status = -1;
    while (child > 0 && waitpid(child, &status, 0) < 0 && !over) {
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int forks(void) {
    int code = (int)pick(100);
    pid_t child = fork();
    if (child == 0)
        _exit(code);
    return ends(child) == code;
}

static int starts(void) {
    char *argv[] = {"true", NULL}, *env[] = {NULL};
    pid_t child;
    if (posix_spawn(&child, "/bin/true", NULL, NULL, argv, env))
        return 0;
    return ends(child) == 0;
}

static int faults(void) {
    uint8_t *at = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int right = at != MAP_FAILED;
    for (int i = 0; right && i < PAGES; i++)
        at[i * PAGE] = (uint8_t)i;
    right = right && !mprotect(at, PAGES * PAGE, PROT_READ);
    for (int i = 0; right && i < PAGES; i++)
        right = at[i * PAGE] == (uint8_t)i && at[i * PAGE + 1] == 0;
    return right && !munmap(at, PAGES * PAGE);
}

static int timers(void) {
    struct itimerval in = {.it_value.tv_usec = 500};
    sig_atomic_t before = signals;
    setitimer(ITIMER_REAL, &in, NULL);
    for (int i = 0; i < 2000 && signals == before && !over; i++)
        rest(1000000);
    return signals > before || over;
}

static int kills(void) {
    pid_t child = fork();
    if (child == 0)
        for (;;)
            pause();
    rest(pick(200000));
    kill(child, SIGKILL);
    return ends(child) == -1;
}

static int talks(void) {
    int to[2], from[2];
    unsigned sent = pick(1 << 20), got = 0;
    if (pipe(to) || pipe(from))
        return 0;
    pid_t child = fork();
    if (child == 0) {
        unsigned heard = 0;
        ssize_t n = read(to[0], &heard, sizeof heard);
        heard++;
        n = n > 0 ? write(from[1], &heard, sizeof heard) : n;
        _exit(n > 0 ? 0 : 1);
    }
    ssize_t n = write(to[1], &sent, sizeof sent);
    while ((n = read(from[0], &got, sizeof got)) < 0 && !over) {
    }
    int ended = ends(child);
    for (int i = 0; i < 2; i++) {
        close(to[i]);
        close(from[i]);
    }
    return got == sent + 1 && ended == 0;
}

static int reads(void) {
    static const char *const files[] = {
        "/proc/version", "/proc/uptime", "/proc/self/stat", "/proc/self/maps", "/proc/meminfo",
        "/proc/loadavg", "/proc/cmdline", "/proc/interrupts",
    };
    char text[PAGE];
    int fd = open(files[pick(sizeof files / sizeof *files)], O_RDONLY);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text);
    close(fd);
    return n >= 0;
}

static int calls(void) {
    pid_t parent = getppid();
    int right = 1;
    for (int i = 0; i < 200; i++)
        right &= syscall(SYS_getppid) == parent;
    sched_yield();
    return right;
}

static int sleeps(void) {
    rest(pick(3000000));
    return 1;
}

static int (*const rounds[])(void) = {forks, starts, faults, timers, kills, talks, reads, calls, sleeps};

static void work(int number) {
    state = 88172645463325252ull ^ (uint64_t)number << 32 ^ (uint64_t)getpid();
    while (!over) {
        all[number].wrong += !rounds[pick(sizeof rounds / sizeof *rounds)]() && !over;
        all[number].rounds++;
    }
    _exit(0);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "storm: see programs/storm.c\n");
        return 2;
    }
    int workers = atoi(argv[2]);
    size_t bytes = (size_t)workers * sizeof *all;
    all = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED)
        return 1;
    struct sigaction counts = {.sa_handler = count}, ends_it = {.sa_handler = finish};
    sigaction(SIGALRM, &counts, NULL);
    sigaction(SIGTERM, &ends_it, NULL);
    pid_t children[workers];
    for (int i = 0; i < workers; i++) {
        children[i] = fork();
        if (children[i] == 0)
            work(i);
    }
    for (double end = now() + atof(argv[1]); now() < end && !over;)
        rest(50000000);
    struct counts sum = {0};
    for (int i = 0; i < workers; i++) {
        kill(children[i], SIGTERM);
        waitpid(children[i], NULL, 0);
        sum.rounds += all[i].rounds;
        sum.wrong += all[i].wrong;
    }
    printf("storm: %lu rounds, %lu wrong\n", sum.rounds, sum.wrong);
    return sum.wrong != 0;
}
