// Threads that share the tasks of one phase after another.
//
// A phase is some hundred microseconds of work, so whoever begins one takes tasks itself and waits
// only for tasks that another thread has really taken: a worker that the system does not run holds
// up nobody. Workers spin for a moment between phases and then sleep; nothing spins between steps.
#pragma once
#include "simd.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_THREADS 64
#define MAX_TASKS ((1 << 24) - 1)

INLINE void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  __asm__ volatile("yield");
#endif
}

struct Threads {
  typedef void (*Task)(void* context, int task, int thread);
  struct Phase {
    Task task;
    void* context;
    int num_tasks;
  };
  static constexpr int NUM_PHASES_KEPT = 16;
  // Some 50 to 200 us, by how long the CPU's pause is: longer than a step's serial parts. Five times
  // as many made steps on a busy machine a fifth slower.
  static constexpr int SPINS = 4000;

  alignas(64) uint64_t next = 0;  // number of the phase << 24 | its next task
  alignas(64) int num_done = 0;
  alignas(64) uint32_t bell = 0;  // changes with each phase; sleepers wait on it
  int num_sleeping = 0;
  bool is_ending = false;
  Phase phases[NUM_PHASES_KEPT];
  pthread_t workers[MAX_THREADS];
  int num_threads = 1;
  pid_t process = 0;
  uint64_t number = 0;

  struct Start {
    Threads* threads;
    int thread;
  };

  // Returns how many threads there are now, which is less than was asked for where the system
  // refuses more.
  int start(int wanted) {
    if (wanted > MAX_THREADS) wanted = MAX_THREADS;
    process = getpid();
    // A signal is for the program's own threads: in a worker it would interrupt no call of theirs.
    sigset_t all_signals, before;
    sigfillset(&all_signals);
    pthread_sigmask(SIG_SETMASK, &all_signals, &before);
    for (num_threads = 1; num_threads < wanted; num_threads++) {
      Start* start = (Start*)malloc(sizeof(Start));
      if (!start) break;
      *start = {this, num_threads};
      if (pthread_create(&workers[num_threads], nullptr, begin_work, start)) {
        free(start);
        break;
      }
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return num_threads;
  }

  void stop() {
    __atomic_store_n(&is_ending, true, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&bell, 1, __ATOMIC_SEQ_CST);
    wake(num_threads);
    // A forked child has no workers, and would wait for them.
    for (int i = 1; i < num_threads && process == getpid(); i++) pthread_join(workers[i], nullptr);
    num_threads = 1;
  }

  template <class F>
  void each(int num_tasks, F&& f) {
    run(num_tasks, [](void* context, int task, int thread) { (*(F*)context)(task, thread); }, &f);
  }

 private:
  void run(int num_tasks, Task task, void* context) {
    if (num_tasks <= 1 || num_threads == 1) {
      for (int i = 0; i < num_tasks; i++) task(context, i, 0);
      return;
    }
    number++;
    Phase* phase = &phases[number % NUM_PHASES_KEPT];
    // A worker that has slept through 16 phases may read this while it is written. It takes no
    // task of it: its compare-and-swap fails, because the number in `next` is another.
    __atomic_store_n(&phase->task, task, __ATOMIC_RELAXED);
    __atomic_store_n(&phase->context, context, __ATOMIC_RELAXED);
    __atomic_store_n(&phase->num_tasks, num_tasks, __ATOMIC_RELAXED);
    __atomic_store_n(&num_done, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&next, number << 24, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&bell, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&num_sleeping, __ATOMIC_SEQ_CST)) wake(num_tasks - 1);
    take_tasks(number, 0);
    for (int i = 0; __atomic_load_n(&num_done, __ATOMIC_ACQUIRE) < num_tasks; i++) {
      pause_briefly();
      if (i > 2000) sched_yield();  // somebody else has the core of the one who holds a task
    }
  }

  void take_tasks(uint64_t which, int thread) {
    uint64_t seen = __atomic_load_n(&next, __ATOMIC_ACQUIRE);
    while (seen >> 24 == which) {
      Phase* phase = &phases[which % NUM_PHASES_KEPT];
      int task = (int)(seen & MAX_TASKS);
      int num_tasks = __atomic_load_n(&phase->num_tasks, __ATOMIC_RELAXED);
      Task run_task = __atomic_load_n(&phase->task, __ATOMIC_RELAXED);
      void* context = __atomic_load_n(&phase->context, __ATOMIC_RELAXED);
      if (task >= num_tasks) return;
      if (__atomic_compare_exchange_n(&next, &seen, seen + 1, true, __ATOMIC_ACQ_REL,
                                      __ATOMIC_ACQUIRE)) {
        run_task(context, task, thread);
        __atomic_fetch_add(&num_done, 1, __ATOMIC_ACQ_REL);
        seen = __atomic_load_n(&next, __ATOMIC_ACQUIRE);
      }
    }
  }

  static void* begin_work(void* argument) {
    Start start = *(Start*)argument;
    free(argument);
    start.threads->work(start.thread);
    return nullptr;
  }

  void work(int thread) {
    uint64_t last = __atomic_load_n(&next, __ATOMIC_ACQUIRE) >> 24;
    while (true) {
      uint64_t now = wait_for_phase_after(last);
      if (__atomic_load_n(&is_ending, __ATOMIC_ACQUIRE)) return;
      take_tasks(now, thread);
      last = now;
    }
  }

  uint64_t wait_for_phase_after(uint64_t last) {
    for (int i = 0;; i++) {
      uint64_t now = __atomic_load_n(&next, __ATOMIC_ACQUIRE) >> 24;
      if (now != last || __atomic_load_n(&is_ending, __ATOMIC_ACQUIRE)) return now;
      if (i < SPINS) {
        pause_briefly();
        continue;
      }
      uint32_t heard = __atomic_load_n(&bell, __ATOMIC_SEQ_CST);
      __atomic_fetch_add(&num_sleeping, 1, __ATOMIC_SEQ_CST);
      if (__atomic_load_n(&next, __ATOMIC_SEQ_CST) >> 24 == last &&
          !__atomic_load_n(&is_ending, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &bell, FUTEX_WAIT_PRIVATE, heard, nullptr, nullptr, 0);
      __atomic_fetch_sub(&num_sleeping, 1, __ATOMIC_SEQ_CST);
      i = 0;
    }
  }

  void wake(int num_workers) {
    syscall(SYS_futex, &bell, FUTEX_WAKE_PRIVATE, num_workers, nullptr, nullptr, 0);
  }
};
