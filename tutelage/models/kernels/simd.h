// Vectors of the processor's own width (GCC and clang vector extensions), their elementary functions, and threads.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <atomic>
#include <thread>
#ifdef _OPENMP
#include <omp.h>
#else
#include <vector>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * VL)));
typedef float vf_any __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef double vd __attribute__((vector_size(8 * VL)));

static INLINE vf load(const float* p) { return *(const vf_any*)p; }
static INLINE void store(float* p, vf x) { *(vf_any*)p = x; }
static INLINE vf splat(float x) { return x - vf{}; }
static INLINE vf load_some(const float* p, int64_t n, float rest = 0.0f) {
    vf x = splat(rest);
    for (int64_t i = 0; i < n; i++) x[i] = p[i];
    return x;
}
static INLINE void store_some(float* p, vf x, int64_t n) {
    for (int64_t i = 0; i < n; i++) p[i] = x[i];
}
static INLINE vi iota() {
    vi x{};
    for (int i = 0; i < VL; i++) x[i] = i;
    return x;
}
static INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
// Lanes 0.. of x moved down by `by`, cyclically: a tree of these is a reduction without a detour through memory.
template <int by>
static INLINE vf rotate(vf x) {
#ifdef __clang__
    vf y;
    for (int i = 0; i < VL; i++) y[i] = x[(i + by) % VL];
    return y;
#else
    return __builtin_shuffle(x, (iota() + by) % VL);
#endif
}
static INLINE float sum(vf x) {
#if VL == 16
    x += rotate<8>(x);
#endif
#if VL >= 8
    x += rotate<4>(x);
#endif
    x += rotate<2>(x);
    x += rotate<1>(x);
    return x[0];
}
static INLINE float max_of(vf x) {
#if VL == 16
    x = vmax(x, rotate<8>(x));
#endif
#if VL >= 8
    x = vmax(x, rotate<4>(x));
#endif
    x = vmax(x, rotate<2>(x));
    x = vmax(x, rotate<1>(x));
    return x[0];
}

// 2^x to about one unit in the last place; 0 below 2^-126, infinity from 2^128 on, NaN stays NaN.
static INLINE vf exp2_(vf x) {
    const vf low = splat(-126.0f), high = splat(128.0f), magic = splat(12582912.0f);
    vf y = x < low ? low : x;
    y = y > high ? high : y;
    vf shifted = y + magic;
    vf f = y - (shifted - magic);
    vf p = splat(0.00015345810970757157f);
    p = p * f + 0.0013399930903688073f;
    p = p * f + 0.009618489071726799f;
    p = p * f + 0.05550328642129898f;
    p = p * f + 0.24022646248340607f;
    p = p * f + 0.6931471824645996f;
    p = p * f + 1.0f;
    // In two factors, because 2^128 itself is not a float.
    vi n = (vi)shifted - 0x4B400000;
    vi half = n >> 1;
    vf a = (vf)((half + 127) << 23), b = (vf)((n - half + 127) << 23);
    vf r = p * a * b;
    return x < low ? vf{} : r;
}
static INLINE vf exp_(vf x) {
    // exp(x) = 2^n * e^r with r = x - n ln 2 in two parts: x * log2(e) in one would lose |x| units in the last place.
    const vf low = splat(-87.3f), high = splat(88.8f), magic = splat(12582912.0f);
    vf y = x < low ? low : x;
    y = y > high ? high : y;
    vf shifted = y * 1.44269504088896341f + magic;
    vf n = shifted - magic;
    vf r = y - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf f = r * 1.44269504088896341f;
    vf p = splat(0.00015345810970757157f);
    p = p * f + 0.0013399930903688073f;
    p = p * f + 0.009618489071726799f;
    p = p * f + 0.05550328642129898f;
    p = p * f + 0.24022646248340607f;
    p = p * f + 0.6931471824645996f;
    p = p * f + 1.0f;
    vi k = (vi)shifted - 0x4B400000;
    vi half = k >> 1;
    vf a = (vf)((half + 127) << 23), b = (vf)((k - half + 127) << 23);
    vf out = p * a * b;
    return x < low ? vf{} : out;
}
static INLINE vf tanh_(vf x) {
    vf s = x * x;
    vf small = x + x * s * (-0.333333343f + s * (0.133333340f + s * (-0.0539682545f + s * (0.0218694881f - s * 0.00886323582f))));
    vf large = 1.0f - 2.0f / (exp_(x + x) + 1.0f);
    return s < 0.0625f ? small : large;
}

static INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class T>
static INLINE T min_(T a, T b) { return a < b ? a : b; }
template <class T>
static INLINE T max_(T a, T b) { return a > b ? a : b; }

// Denormal numbers are as slow as a hundred others; inside the kernels they are 0.
struct FlushDenormals {
#if defined(__x86_64__) || defined(__i386__)
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

// Where the threads of one call wait for each other. libgomp's own barrier puts threads to sleep after a microsecond once a process
// has more OpenMP threads than cores, as one with an engine thread beside its main thread has: half the time of a small model.
class Meeting {
    std::atomic<int> arrived{0}, round{0};
    static constexpr int SPINS = 20000;  // some tenths of a millisecond; then others may have the core

public:
    void wait(int threads) {
        if (threads == 1) return;
        const int now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++) {
            if (spins >= SPINS)
                std::this_thread::yield();
            else
#if defined(__x86_64__) || defined(__i386__)
                _mm_pause();
#elif defined(__aarch64__)
                asm volatile("yield");
#else
                continue;
#endif
        }
    }
};

// Scratch memory of one thread: grows, is kept for the next call, and is given back when the thread ends.
struct Scratch {
    float* data = nullptr;
    size_t size = 0;
    float* get(size_t floats) {
        if (floats > size) {
            free(data);
            size = round_up(floats, 1024);
            data = (float*)aligned_alloc(64, size * 4);
            if (!data) throw std::bad_alloc();
        }
        return data;
    }
    ~Scratch() { free(data); }
};

// Calls work(i) for i < count on up to `threads` threads. Each i must write memory of its own; then who does which does not matter.
template <class F>
static void for_each(int64_t count, int threads, const F& work) {
    threads = (int)max_<int64_t>(1, min_<int64_t>(threads, count));
    if (threads == 1) {
        FlushDenormals flush;
        for (int64_t i = 0; i < count; i++) work(i);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals flush;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) work(i);
    }
#else
    std::atomic<int64_t> next{0};
    auto loop = [&] {
        FlushDenormals flush;
        for (int64_t i; (i = next++) < count;) work(i);
    };
    std::vector<std::thread> team;
    for (int t = 1; t < threads; t++) team.emplace_back(loop);
    loop();
    for (auto& t : team) t.join();
#endif
}
