// Lets the kernels' text run on a processor: each block of threads as fibers of one thread, which take turns at every barrier and every
// shuffle. `backwards` turns the order of the turns round: what depends on it lacks a barrier.
//
// Compiled before the text; `launches.h` comes after it. The switch is setjmp's without signals: swapcontext asks the system each time.

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <algorithm>
#include <functional>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(bytes) alignas(bytes)
#define __shared__ static

using std::min;

struct Dim {
    unsigned x, y, z;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;

namespace processor {
constexpr unsigned WARP = 32, THREADS_MAX = 1024;
constexpr size_t STACK_BYTES = 256 << 10;

struct Fiber {
    ucontext_t context;
    jmp_buf at;
    bool started, over;
    std::vector<char> stack;
};
static std::vector<Fiber> fibers(THREADS_MAX);
static ucontext_t home;
static jmp_buf back;
static std::function<void()> body;
static bool moved;  // somebody passed a barrier or came to an end in this round

static void yield() {
    Fiber &fiber = fibers[threadIdx.x];
    if (_setjmp(fiber.at) == 0) _longjmp(back, 1);
}

static void first() {
    body();
    fibers[threadIdx.x].over = true;
    moved = true;
    _longjmp(back, 1);
}

static void resume(unsigned thread) {
    threadIdx = {thread, 0, 0};
    Fiber &fiber = fibers[thread];
    if (_setjmp(back) != 0) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    swapcontext(&home, &fiber.context);
}

static void run_block(bool backwards) {
    unsigned threads = blockDim.x;
    for (unsigned i = 0; i < threads; i++) {
        Fiber &fiber = fibers[i];
        fiber.stack.resize(STACK_BYTES);
        fiber.started = fiber.over = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, first, 0);
    }
    for (bool all = false; !all;) {
        all = true;
        moved = false;
        for (unsigned i = 0; i < threads; i++) {
            unsigned thread = backwards ? threads - 1 - i : i;
            if (!fibers[thread].over) resume(thread);
            all = all && fibers[thread].over;
        }
        if (!all && !moved) {
            fprintf(stderr, "a barrier that not all threads come to\n");
            abort();
        }
    }
}

struct Barrier {
    unsigned came = 0, turn = 0;
    void wait(unsigned all) {
        unsigned mine = turn;
        if (++came == all) {
            came = 0;
            turn++;
            moved = true;
        }
        while (turn == mine) yield();
    }
};
static Barrier block_barrier, warp_barriers[THREADS_MAX / WARP];
static float exchanged[THREADS_MAX];

static void warp_barrier() { warp_barriers[threadIdx.x / WARP].wait(min(WARP, blockDim.x - threadIdx.x / WARP * WARP)); }

static void launch(Dim grid, unsigned threads, bool backwards, std::function<void()> kernel) {
    gridDim = grid;
    blockDim = {threads, 1, 1};
    body = std::move(kernel);
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                run_block(backwards);
            }
}
}  // namespace processor

static inline void __syncthreads() { processor::block_barrier.wait(blockDim.x); }

static inline float __shfl_xor_sync(unsigned, float x, int step) {
    processor::exchanged[threadIdx.x] = x;
    processor::warp_barrier();
    float other = processor::exchanged[threadIdx.x ^ step];
    processor::warp_barrier();
    return other;
}

// glibc has a function of this name.
#define __expf(x) std::exp(x)
static inline float __uint_as_float(unsigned x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
static inline unsigned __float_as_uint(float x) {
    unsigned y;
    memcpy(&y, &x, 4);
    return y;
}
