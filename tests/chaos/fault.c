/* Preloaded into a training by `make chaos`: it counts the calls that change files whose path holds FAULT_PATH, and at
   call FAULT_AT does what FAULT_ACT says: "kill" before the call; "half" writes half and kills; "full" fails this and
   every later call with FAULT_ERRNO; "once" fails this call alone; "log" appends every call to FAULT_LOG.
   The variables are read at each call, so that a process may set them for a child that it forks. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { GO_ON, FAIL, HALF };

static long calls = 0;
static int failing = 0;
static pid_t owner = 0;

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  pause();
}

static void note(const char *what, const char *path) {
  const char *log = getenv("FAULT_LOG");
  if (!log) return;
  int file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
  if (file < 0) return;
  char line[4600];
  int size = snprintf(line, sizeof line, "%ld %s %s\n", calls, what, path);
  syscall(SYS_write, file, line, size);
  syscall(SYS_close, file);
}

static int hit(const char *what, const char *path) {
  const char *wanted = getenv("FAULT_PATH");
  if (!wanted || !path || !strstr(path, wanted)) return GO_ON;
  const char *act = getenv("FAULT_ACT"), *at = getenv("FAULT_AT"), *number = getenv("FAULT_ERRNO");
  if (owner != getpid()) {
    owner = getpid();
    calls = failing = 0;
  }
  calls++;
  if (!act) return GO_ON;
  if (!strcmp(act, "log")) note(what, path);
  if (!at) return GO_ON;
  int frees = !strcmp(what, "close") || !strcmp(what, "unlink");
  if (failing && !frees) {
    errno = atoi(number);
    return FAIL;
  }
  if (calls != atol(at)) return GO_ON;
  if (!strcmp(act, "kill")) die();
  if (!strcmp(act, "half")) {
    if (!strcmp(what, "write")) return HALF;
    die();
  }
  if (strcmp(act, "full") && strcmp(act, "once")) return GO_ON;
  failing = !strcmp(act, "full");
  if (frees) return GO_ON;
  errno = atoi(number);
  return FAIL;
}

static const char *path_of(int file, char *buffer) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, buffer, 4095);
  if (size < 0) return NULL;
  buffer[size] = 0;
  return buffer;
}

#define REAL(type, name, ...)            \
  static type (*real)(__VA_ARGS__);      \
  if (!real) real = dlsym(RTLD_NEXT, name)
#define WATCHED (getenv("FAULT_PATH") != NULL)

ssize_t write(int file, const void *bytes, size_t size) {
  REAL(ssize_t, "write", int, const void *, size_t);
  char path[4096];
  int fate = WATCHED && file > 2 ? hit("write", path_of(file, path)) : GO_ON;
  if (fate == FAIL) return -1;
  if (fate == HALF) {
    real(file, bytes, size / 2);
    die();
  }
  return real(file, bytes, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
  REAL(ssize_t, "writev", int, const struct iovec *, int);
  char path[4096];
  int fate = WATCHED && file > 2 ? hit("write", path_of(file, path)) : GO_ON;
  if (fate == FAIL) return -1;
  if (fate == HALF) {
    real(file, parts, count > 1 ? count / 2 : 1);
    die();
  }
  return real(file, parts, count);
}

int close(int file) {
  REAL(int, "close", int);
  if (WATCHED && file > 2) {
    char path[4096];
    int flags = fcntl(file, F_GETFL);
    if (flags >= 0 && (flags & O_ACCMODE) != O_RDONLY) hit("close", path_of(file, path));
  }
  return real(file);
}

int fsync(int file) {
  REAL(int, "fsync", int);
  char path[4096];
  if (WATCHED && hit("fsync", path_of(file, path)) == FAIL) return -1;
  return real(file);
}

int rename(const char *from, const char *to) {
  REAL(int, "rename", const char *, const char *);
  return hit("rename", to) == FAIL ? -1 : real(from, to);
}

int unlink(const char *name) {
  REAL(int, "unlink", const char *);
  return hit("unlink", name) == FAIL ? -1 : real(name);
}

int unlinkat(int folder, const char *name, int flags) {
  REAL(int, "unlinkat", int, const char *, int);
  char whole[8300], place[4096];
  const char *path = name;
  if (WATCHED && folder != AT_FDCWD && name[0] != '/') {
    const char *found = path_of(folder, place);
    snprintf(whole, sizeof whole, "%s/%s", found ? found : "", name);
    path = whole;
  }
  return hit("unlink", path) == FAIL ? -1 : real(folder, name, flags);
}

int rmdir(const char *name) {
  REAL(int, "rmdir", const char *);
  return hit("unlink", name) == FAIL ? -1 : real(name);
}

int mkdir(const char *name, mode_t mode) {
  REAL(int, "mkdir", const char *, mode_t);
  return hit("mkdir", name) == FAIL ? -1 : real(name, mode);
}

static int refused(const char *name, int flags) {
  return flags & (O_CREAT | O_WRONLY | O_RDWR) && hit("open", name) == FAIL;
}

#define MODE(flags)                          \
  mode_t mode = 0;                           \
  if ((flags) & (O_CREAT | O_TMPFILE)) {     \
    va_list rest;                            \
    va_start(rest, flags);                   \
    mode = va_arg(rest, mode_t);             \
    va_end(rest);                            \
  }

#define OPEN(name)                                     \
  int name(const char *path, int flags, ...) {         \
    REAL(int, #name, const char *, int, ...);          \
    MODE(flags)                                        \
    return refused(path, flags) ? -1 : real(path, flags, mode); \
  }
#define OPENAT(name)                                              \
  int name(int folder, const char *path, int flags, ...) {        \
    REAL(int, #name, int, const char *, int, ...);                \
    MODE(flags)                                                   \
    return refused(path, flags) ? -1 : real(folder, path, flags, mode); \
  }
#define FOPEN(name)                                                       \
  FILE *name(const char *path, const char *mode) {                        \
    REAL(FILE *, #name, const char *, const char *);                      \
    if ((mode[0] != 'r' || strchr(mode, '+')) && hit("open", path) == FAIL) return NULL; \
    return real(path, mode);                                              \
  }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)
