/* Lets one system call of a process fail, by its number, with an error: preloaded by tests/failing_calls.py.
 *
 * fail_call(name, at, error) counts the calls of that name from now on; the call of the number `at` fails with `error`,
 * an errno, and does nothing; 0: none does. calls_made() is the count.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

static char chosen[32];
static atomic_long made;
static long fails_at;
static int fails_with;

void fail_call(const char *name, long at, int error) {
    strncpy(chosen, name, sizeof chosen - 1);
    atomic_store(&made, 0);
    fails_at = at;
    fails_with = error;
}

long calls_made(void) { return atomic_load(&made); }

static int fails(const char *name) {
    if (strcmp(name, chosen) != 0 || atomic_fetch_add(&made, 1) + 1 != fails_at) return 0;
    errno = fails_with;
    return 1;
}

#define WRAP(result, symbol, name, failed, parameters, arguments)             \
    result symbol parameters {                                                \
        static result (*real) parameters;                                     \
        if (!real) real = (result(*) parameters)dlsym(RTLD_NEXT, #symbol);    \
        return fails(name) ? failed : real arguments;                         \
    }

WRAP(ssize_t, write, "write", -1, (int fd, const void *data, size_t count), (fd, data, count))
WRAP(ssize_t, pwrite, "pwrite", -1, (int fd, const void *data, size_t count, off_t at), (fd, data, count, at))
WRAP(ssize_t, pwrite64, "pwrite", -1, (int fd, const void *data, size_t count, off64_t at), (fd, data, count, at))
WRAP(int, fsync, "fsync", -1, (int fd), (fd))
WRAP(int, rename, "rename", -1, (const char *from, const char *to), (from, to))
WRAP(int, renameat, "rename", -1, (int a, const char *from, int b, const char *to), (a, from, b, to))
WRAP(int, ftruncate, "ftruncate", -1, (int fd, off_t size), (fd, size))
WRAP(int, ftruncate64, "ftruncate", -1, (int fd, off64_t size), (fd, size))
/* Only maps of files: memory that Python itself cannot get while it starts a thread stops it for ever (3.11). */
#define WRAP_MAP(symbol, offset)                                                                  \
    void *symbol(void *to, size_t size, int how, int flags, int fd, offset at) {                  \
        static void *(*real)(void *, size_t, int, int, int, offset);                              \
        if (!real) real = (void *(*)(void *, size_t, int, int, int, offset))dlsym(RTLD_NEXT, #symbol); \
        return fd >= 0 && fails("mmap") ? MAP_FAILED : real(to, size, how, flags, fd, at);        \
    }

WRAP_MAP(mmap, off_t)
WRAP_MAP(mmap64, off64_t)

/* The mode is there only for some flags, and may be passed on in any case. */
#define WRAP_OPEN(symbol, parameters, arguments)                              \
    int symbol parameters {                                                   \
        static int (*real)();                                                 \
        va_list rest;                                                         \
        va_start(rest, flags);                                                \
        mode_t mode = va_arg(rest, mode_t);                                   \
        va_end(rest);                                                         \
        if (!real) real = (int (*)())dlsym(RTLD_NEXT, #symbol);               \
        return fails("open") ? -1 : real arguments;                           \
    }

WRAP_OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
WRAP_OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
WRAP_OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
WRAP_OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
