/* Threads that wait awake for the next piece of a step.

In: a function and how many items it shall be called for. Out: all of them done, by whichever thread
came first. A step has a hundred and more pieces, many of them shorter than waking a thread takes.
(Not OpenMP, of which PyTorch brings a copy that must not meet another.) Threads sleep when nothing
has come for a while; none is started before the first step. Each kind of step, into which this is
compiled, has threads of its own; a process uses one kind. */

#ifndef MAS_STEP_THREADS_H
#define MAS_STEP_THREADS_H

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#ifdef __x86_64__
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() __asm__ volatile("isb")
#endif

enum {
    MOST_THREADS = 256,
    PAUSES = 2000, /* that an idle thread spins before it lets others run, ~0.05 ms */
    YIELDS = 2000, /* that it then goes on looking before it sleeps, ~1 ms */
};

typedef void Work(void *about, int64_t item);

/* The threads claim what is to do by counting `left` down. What is claimed is not over before
   `done` says so, so it does not matter whether a thread comes late, or not at all. */
static struct {
    _Alignas(64) _Atomic int64_t left; /* items nobody has claimed */
    _Alignas(64) _Atomic int64_t done;
    _Alignas(64) Work *work;
    void *about;
    int64_t items;
    _Alignas(64) _Atomic int helpers; /* threads that may take part beside the caller's */
    _Atomic int asleep; /* those that a call of `wake` reaches */
    int started;
    int watches_forks;
    pthread_mutex_t turn; /* one caller at a time */
    pthread_mutex_t sleep;
    pthread_cond_t wake, more; /* there is work; there are more helpers */
} pool = {.turn = PTHREAD_MUTEX_INITIALIZER,
          .sleep = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .more = PTHREAD_COND_INITIALIZER};

/* Does one item, if one is left. */
static int take_part(void) {
    int64_t left = atomic_load_explicit(&pool.left, memory_order_relaxed);
    while (left > 0) {
        if (atomic_compare_exchange_weak(&pool.left, &left, left - 1)) {
            pool.work(pool.about, pool.items - left);
            atomic_fetch_add_explicit(&pool.done, 1, memory_order_release);
            return 1;
        }
    }
    return 0;
}

static void sleep_until_needed(int index) {
    pthread_mutex_lock(&pool.sleep);
    while (index >= atomic_load(&pool.helpers))
        pthread_cond_wait(&pool.more, &pool.sleep);
    atomic_fetch_add(&pool.asleep, 1);
    while (atomic_load(&pool.left) <= 0 && index < atomic_load(&pool.helpers))
        pthread_cond_wait(&pool.wake, &pool.sleep);
    atomic_fetch_sub(&pool.asleep, 1);
    pthread_mutex_unlock(&pool.sleep);
}

static void *help(void *argument) {
    int index = (int)(intptr_t)argument;
    for (int idle = 0;; idle++) {
        if (index < atomic_load_explicit(&pool.helpers, memory_order_relaxed) && take_part())
            idle = 0;
        else if (idle < PAUSES)
            PAUSE();
        else if (idle < PAUSES + YIELDS)
            sched_yield();
        else {
            sleep_until_needed(index);
            idle = 0;
        }
    }
    return NULL;
}

/* In a forked child, which has none of the threads. */
static void forget_threads(void) {
    pool.started = 0;
    atomic_store(&pool.left, 0);
    atomic_store(&pool.asleep, 0);
    pthread_mutex_init(&pool.turn, NULL);
    pthread_mutex_init(&pool.sleep, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.more, NULL);
}

/* Takes the pool for this caller, with as many threads as can be had. */
static void open_pool(int64_t threads) {
    pthread_mutex_lock(&pool.turn);
    if (!pool.watches_forks)
        pool.watches_forks = pthread_atfork(NULL, NULL, forget_threads) == 0;
    int helpers = (int)(threads > MOST_THREADS ? MOST_THREADS : threads) - 1;
    sigset_t all, before; /* signals are for the threads that expect them */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.started < helpers) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, (void *)(intptr_t)pool.started) != 0)
            break;
        pthread_detach(thread);
        pool.started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (helpers != atomic_load(&pool.helpers)) {
        pthread_mutex_lock(&pool.sleep);
        atomic_store(&pool.helpers, helpers);
        pthread_cond_broadcast(&pool.more);
        pthread_mutex_unlock(&pool.sleep);
    }
}

static void close_pool(void) { pthread_mutex_unlock(&pool.turn); }

/* Runs `work` for the items 0 … items - 1 on all threads of the open pool, and waits for it. */
static void share(Work *work, void *about, int64_t items) {
    if (pool.helpers <= 0 || items == 1) {
        for (int64_t item = 0; item < items; item++)
            work(about, item);
        return;
    }
    pool.work = work;
    pool.about = about;
    pool.items = items;
    atomic_store(&pool.done, 0);
    atomic_store(&pool.left, items);
    if (atomic_load(&pool.asleep) > 0) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep);
    }
    while (take_part())
        ;
    for (int waits = 0; atomic_load_explicit(&pool.done, memory_order_acquire) < items; waits++) {
        if (waits < PAUSES)
            PAUSE();
        else
            sched_yield();
    }
}

#endif
