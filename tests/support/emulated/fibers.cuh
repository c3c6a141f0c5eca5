// Fibers: what looks like threads takes turns on one thread of the machine.
//
// A fiber runs until it waits for others. Which of those that can go on is next is drawn, so that nothing holds only
// because of an order; the draws are the same in every run. Where none can go on, the program ends and says so.

#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <vector>

struct Fiber {
    static constexpr int STACK = 256 * 1024;

    char* const stack = new char[STACK];
    ucontext_t start;
    jmp_buf rest;
    bool begun = false;

    Fiber() = default;
    Fiber(const Fiber&) = delete;
    virtual ~Fiber() { delete[] stack; }
    virtual void work() = 0;
};
typedef std::vector<Fiber*> Fibers;

static Fiber* self;  // the one that runs
static Fibers ready;
static size_t alive;
static unsigned long long drawn;
static jmp_buf all_ended;

[[noreturn]] static void go_on_with_another() {
    if (alive == 0) _longjmp(all_ended, 1);
    if (ready.empty()) {
        fprintf(stderr, "%zu threads wait for ever\n", alive);
        abort();
    }
    drawn = drawn * 6364136223846793005 + 1442695040888963407;  // Knuth's MMIX; its high bits are the good ones
    std::swap(ready[(drawn >> 33) % ready.size()], ready.back());
    self = ready.back();
    ready.pop_back();
    if (self->begun) _longjmp(self->rest, 1);
    self->begun = true;
    setcontext(&self->start);
    abort();
}

// Until another fiber wakes all of `queue`. Unlike `swapcontext`, jumps make no system call.
__attribute__((noinline)) static void wait_in(Fibers& queue) {
    queue.push_back(self);
    if (_setjmp(self->rest) == 0) go_on_with_another();
}

static void wake(Fibers& queue) {
    ready.insert(ready.end(), queue.begin(), queue.end());
    queue.clear();
}

static void be_fiber() {
    self->work();
    --alive;
    go_on_with_another();
}

// Run all to their ends.
__attribute__((noinline)) static void run(const Fibers& fibers) {
    for (Fiber* fiber : fibers) {
        getcontext(&fiber->start);
        fiber->start.uc_stack.ss_sp = fiber->stack;
        fiber->start.uc_stack.ss_size = Fiber::STACK;
        makecontext(&fiber->start, be_fiber, 0);
    }
    ready = fibers;
    alive = fibers.size();
    drawn = 0;
    if (_setjmp(all_ended) == 0) go_on_with_another();
}

// Whoever comes waits until all of them have come.
class Meeting {
    int expected, arrived = 0;
    Fibers waiting;

    bool complete() {
        if (arrived < expected) return false;
        arrived = 0;
        wake(waiting);
        return true;
    }

public:
    explicit Meeting(int expected) : expected(expected) {}
    void arrive_and_wait() {
        ++arrived;
        if (!complete()) wait_in(waiting);
    }
    void arrive_and_drop() {
        --expected;
        complete();
    }
};
