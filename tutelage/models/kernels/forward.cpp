// The forward pass of some new tokens against the cache in one call: what a decoder does most while it generates.
// Every output element is one sum in one fixed order, however the rows are grouped: so a token's logits do not depend, bit for
// bit, on what else is in the batch.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <utility>

#include "attend.h"
#include "heads.h"

// The same fields in the same order as the structures in decoder.py.
struct Matrix {
    const void* weight;   // [out, in], rows side by side
    const float* scale;   // [out] of int8 rows, else none
    const float* bias;    // [out], or none
    int64_t out, in, kind;  // kind: 0 float32, 1 int8, 2 bfloat16
};
struct Norm {
    const float *weight, *bias;
    int64_t kind;  // 0 none, 1 RMS, 2 layer
};
struct LayerPlan {
    Matrix q, k, v, o, gate, up, down;
    Norm attention_in, attention_out, mlp_in, mlp_out, q_norm, k_norm;
    float *keys, *values;      // [slots, length, Hkv, D]
    const float *cos, *sin;    // [positions, rotary], or none
    int64_t rotary, window;    // window 0: unlimited
    float scale, unused;
};
struct LowRank {  // y += scale * B A x; rank is a multiple of 16, or 0 for none
    const float *a, *b;  // [rank, in], [out, rank]
    int64_t rank;
    float scale, unused;
};
struct LayerAdapter {
    LowRank q, k, v, o, gate, up, down;
};
struct DecoderPlan {
    const LayerPlan* layers;
    int64_t count, hidden, heads, kv_heads, width, wide, gated, activation, qk_norm;  // qk_norm: 0 none, 1 each head, 2 all heads
    const float *embeddings, *positions;  // [V,H]; [positions,H], or none
    Norm last;
    Matrix head;
    int64_t slot_stride, threads;  // floats between slots of the cache
    float eps, offset, cap, embedding_scale, logit_scale, logit_cap;
};

namespace {

enum Activation { SILU, GELU, GELU_TANH, RELU };
constexpr int64_t GRAIN = 16;   // output rows that one thread takes at a time
constexpr int64_t BLOCK = 32;   // rows of weights that the tokens pass by at a time
constexpr int64_t AHEAD = 12 << 10;  // bytes that are worth fetching ahead where each is used once
constexpr int64_t TOKENS = 64;  // tokens whose activations stay in the first caches while the weights pass by

template <int kind>
INLINE vf weight_at(const void* row, int64_t i);
template <>
INLINE vf weight_at<0>(const void* row, int64_t i) { return load((const float*)row + i); }
template <>
INLINE vf weight_at<1>(const void* row, int64_t i) {
    const int8_t* p = (const int8_t*)row + i;
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    typedef int8_t bytes __attribute__((vector_size(VL), aligned(1), may_alias));
    return __builtin_convertvector(*(const bytes*)p, vf);
#endif
}
template <>
INLINE vf weight_at<2>(const void* row, int64_t i) {
    typedef uint16_t halves __attribute__((vector_size(2 * VL), aligned(2), may_alias));
    typedef uint32_t words __attribute__((vector_size(4 * VL)));
    return (vf)(__builtin_convertvector(*(const halves*)((const uint16_t*)row + i), words) << 16);
}
template <int kind>
constexpr int64_t bytes_of() { return kind == 0 ? 4 : kind == 1 ? 1 : 2; }

// Keeps a value in its register: GCC would rather load it again at every use, and the loads, not the products, would be the time.
#if defined(__x86_64__)
#define KEEP(x) asm("" : "+v"(x))
#elif defined(__aarch64__)
#define KEEP(x) asm("" : "+w"(x))
#else
#define KEEP(x)
#endif

// dots[t * O + o] = x_t . w_o for a tile of T tokens and O rows of weights, T * O = 16.
template <int kind, int T, int O>
INLINE void tile(const float* const* x, const char* w, int64_t in, float* dots) {
    const int64_t row = in * bytes_of<kind>();
    vf total[16] = {};
    for (int64_t i = 0; i < in; i += VL) {
        vf seen[O];
#pragma GCC unroll 16
        for (int o = 0; o < O; o++) {
            seen[o] = weight_at<kind>(w + o * row, i);
            if (T > 1) KEEP(seen[o]);
        }
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) {
            vf own = load(x[t] + i);
            if (O > 1) KEEP(own);
#pragma GCC unroll 16
            for (int o = 0; o < O; o++) total[t * O + o] += own * seen[o];
        }
    }
    sums16(total, dots);
}

// Where products go: row t, column o of `to`, over what is there or onto it.
struct Target {
    float* to;
    int64_t stride;
    bool add = false;

    template <int kind, int O>
    INLINE void put(const float* dots, const Matrix& m, int64_t t, int64_t o) const {
        float y[O], *row = to + t * stride + o;
        for (int j = 0; j < O; j++) y[j] = kind == 1 ? dots[j] * m.scale[o + j] : dots[j];
        if (m.bias)
            for (int j = 0; j < O; j++) y[j] += m.bias[o + j];
        for (int j = 0; j < O; j++) row[j] = add ? row[j] + y[j] : y[j];
    }
    Target from(int64_t t) const { return {to + t * stride, stride, add}; }
};

struct Share {
    int64_t first, last;
};
// The output columns that a thread makes.
Share share_of(int64_t out, int thread, int threads) {
    const int64_t grains = (out + GRAIN - 1) / GRAIN;
    return {grains * thread / threads * GRAIN, min_(out, grains * (thread + 1) / threads * GRAIN)};
}

// Products of `count` tokens (rows of x, `stride` apart) with weight rows first .. last. With O > 1, both are multiples of O.
template <int kind, int T, int O>
void products(const float* x, int64_t stride, int64_t count, const Matrix& m, int64_t first, int64_t last, const Target& target) {
    const char* w = (const char*)m.weight;
    const int64_t row = m.in * bytes_of<kind>();
    alignas(64) float dots[16];
    // Some rows of weights at a time: they stay in the second cache while the tokens, in the first, pass by.
    for (int64_t block = first; block < last; block += BLOCK)
        for (int64_t t = 0; t < count; t += T) {
            const float* own[T];
            for (int i = 0; i < T; i++) own[i] = x + min_(t + i, count - 1) * stride;
            for (int64_t o = block; o < min_(last, block + BLOCK); o += O) {
                if (t == 0 && (T > 1 || O * row <= AHEAD))  // met for the first time: the next tile's weights travel meanwhile
                    for (int64_t b = 0; b < O * row; b += 64) __builtin_prefetch(w + (o + O) * row + b);
                tile<kind, T, O>(own, w + o * row, m.in, dots);
                for (int64_t i = 0; i < min_<int64_t>(T, count - t); i++) target.put<kind, O>(dots + i * O, m, t + i, o);
            }
        }
}

template <int kind>
void products_of(const float* x, int64_t stride, int64_t count, const Matrix& m, int64_t first, int64_t last, const Target& target) {
    const int64_t whole = first + (last - first) / GRAIN * GRAIN;
    for (int64_t t = 0; t < count; t += TOKENS) {
        const int64_t n = min_(TOKENS, count - t);
        const float* from = x + t * stride;
        const Target to = target.from(t);
        if (n == 1)
            products<kind, 1, 16>(from, stride, n, m, first, whole, to);
        else if (n == 2)
            products<kind, 2, 8>(from, stride, n, m, first, whole, to);
        else
            products<kind, 4, 4>(from, stride, n, m, first, whole, to);
        products<kind, 16, 1>(from, stride, n, m, whole, last, to);
    }
}

// This thread's share of y = x W^T + b.
void multiply(const float* x, int64_t stride, int64_t count, const Matrix& m, int thread, int threads, const Target& target) {
    const auto [first, last] = share_of(m.out, thread, threads);
    if (first >= last) return;
    if (m.kind == 0) products_of<0>(x, stride, count, m, first, last, target);
    if (m.kind == 1) products_of<1>(x, stride, count, m, first, last, target);
    if (m.kind == 2) products_of<2>(x, stride, count, m, first, last, target);
}

// Adds the low-rank part of one row to columns first .. last, multiples of 16. Every thread makes A x anew: less work than a barrier.
void adapt(const float* x, int64_t in, const LowRank& low, Share share, float* y, Scratch& memory) {
    float* inner = memory.get(low.rank);
    alignas(64) float dots[16];
    for (int64_t r = 0; r < low.rank; r += 16) tile<0, 1, 16>(&x, (const char*)(low.a + r * in), in, inner + r);
    for (int64_t o = share.first; o < share.last; o += 16) {
        tile<0, 1, 16>((const float* const*)&inner, (const char*)(low.b + o * low.rank), low.rank, dots);
        for (int64_t j = 0; j < 16; j++) y[o + j] += low.scale * dots[j];
    }
}

void normalise(const Norm& norm, const float* x, float* y, int64_t n, float eps, float offset) {
    if (norm.kind == 0) {
        if (x != y) memcpy(y, x, n * 4);
        return;
    }
    float mean = 0;
    if (norm.kind == 2) {
        vf t{};
        for (int64_t i = 0; i < n; i += VL) t += load(x + i);
        mean = sum(t) / (float)n;
    }
    vf s{};
    for (int64_t i = 0; i < n; i += VL) {
        const vf d = load(x + i) - mean;
        s += d * d;
    }
    const float f = 1.0f / sqrtf(sum(s) / (float)n + eps), plus = norm.kind == 1 ? offset : 0.0f;
    for (int64_t i = 0; i < n; i += VL) {
        vf d = (load(x + i) - mean) * f * (load(norm.weight + i) + plus);
        if (norm.bias) d += load(norm.bias + i);
        store(y + i, d);
    }
}

INLINE float activate(float x, int64_t kind) {
    if (kind == SILU) return x / (1.0f + expf(-x));
    if (kind == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    if (kind == GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    return x > 0 ? x : 0;
}

void activate_all(float* x, const float* times, int64_t n, int64_t kind) {
    if (kind == SILU || kind == GELU_TANH) {
        for (int64_t i = 0; i < n; i += VL) {
            const vf y = load(x + i);
            vf z = kind == SILU ? y / (1.0f + exp_(-y)) : 0.5f * y * (1.0f + tanh_(0.79788456080286536f * (y + 0.044715f * y * y * y)));
            store(x + i, times ? z * load(times + i) : z);
        }
        return;
    }
    for (int64_t i = 0; i < n; i++) x[i] = activate(x[i], kind) * (times ? times[i] : 1.0f);
}

struct Buffers {
    float *x, *normed, *qkv, *mixed, *wide, *block;
    int64_t qkv_width;
};

// One layer's work of one thread. A barrier stands wherever the next lines read what another thread wrote.
struct Worker {
    const DecoderPlan& plan;
    const Buffers& to;
    const int64_t *slots, *places;
    const LayerAdapter* const* adapters;  // [rows], each with a part per layer, or none
    int64_t rows;
    int thread, threads;
    Scratch& scores;
    Meeting& meeting;
    int64_t depth = 0;  // of the layer

    void barrier() const { meeting.wait(threads); }
    template <class Body>
    void each_row(const Body& body) const {
        for (int64_t r = rows * thread / threads; r < rows * (thread + 1) / threads; r++) body(r);
    }
    // This thread's share of a product, with what adapters add to it.
    void multiply_adapted(const float* x, int64_t stride, const Matrix& m, LowRank LayerAdapter::* part, const Target& target) const {
        multiply(x, stride, rows, m, thread, threads, target);
        for (int64_t r = 0; adapters && r < rows; r++) {
            if (!adapters[r]) continue;
            const LowRank& low = adapters[r][depth].*part;
            if (low.rank) adapt(x + r * stride, m.in, low, share_of(m.out, thread, threads), target.to + r * target.stride, scores);
        }
    }
    void norm_rows(const Norm& norm, const float* from, float* onto, int64_t width) const {
        each_row([&](int64_t r) { normalise(norm, from + r * width, onto + r * width, width, plan.eps, plan.offset); });
        barrier();
    }
    // Adds a block's output to x, through the norm behind the block where there is one.
    void add_block(const float* from, int64_t width, const Matrix& m, LowRank LayerAdapter::* part, const Norm& norm) const {
        const int64_t H = plan.hidden;
        if (norm.kind == 0) {
            multiply_adapted(from, width, m, part, {to.x, H, true});
            barrier();
            return;
        }
        multiply_adapted(from, width, m, part, {to.block, H});
        barrier();
        each_row([&](int64_t r) {
            float* b = to.block + r * H;
            normalise(norm, b, b, H, plan.eps, plan.offset);
            for (int64_t i = 0; i < H; i++) to.x[r * H + i] += b[i];
        });
        barrier();
    }
    void project(const LayerPlan& layer) const {
        const int64_t width = to.qkv_width;
        multiply_adapted(to.normed, plan.hidden, layer.q, &LayerAdapter::q, {to.qkv, width});
        multiply_adapted(to.normed, plan.hidden, layer.k, &LayerAdapter::k, {to.qkv + layer.q.out, width});
        multiply_adapted(to.normed, plan.hidden, layer.v, &LayerAdapter::v, {to.qkv + layer.q.out + layer.k.out, width});
        barrier();
    }
    // Norms and positions of query and key heads; keys and values go to the cache.
    void place(const LayerPlan& layer) const {
        const int64_t D = plan.width, queries = plan.heads * D, keys = plan.kv_heads * D;
        each_row([&](int64_t r) {
            float *q = to.qkv + r * to.qkv_width, *k = q + queries, *v = k + keys;
            if (plan.qk_norm == 2) {
                normalise(layer.q_norm, q, q, queries, plan.eps, plan.offset);
                normalise(layer.k_norm, k, k, keys, plan.eps, plan.offset);
            }
            HeadPrep prep;
            prep.offset = plan.offset, prep.eps = plan.eps, prep.cos = layer.cos, prep.sin = layer.sin, prep.rotary = layer.rotary;
            const bool each = plan.qk_norm == 1;
            if (each || layer.cos) {
                prep.weight = each ? layer.q_norm.weight : nullptr;
                for (int64_t h = 0; h < plan.heads; h++) prep.apply(q + h * D, q + h * D, D, 0, places[r], 1.0f);
                prep.weight = each ? layer.k_norm.weight : nullptr;
                for (int64_t h = 0; h < plan.kv_heads; h++) prep.apply(k + h * D, k + h * D, D, 0, places[r], 1.0f);
            }
            const int64_t at = slots[r] * plan.slot_stride + places[r] * keys;
            memcpy(layer.keys + at, k, keys * 4);
            memcpy(layer.values + at, v, keys * 4);
        });
        barrier();
    }
    void attention(const LayerPlan& layer) const {
        const int64_t D = plan.width, group = plan.heads / plan.kv_heads, queries = plan.heads * D, step = plan.kv_heads * D;
        const int64_t units = rows * plan.kv_heads;
        for (int64_t u = thread; u < units; u += threads) {
            const int64_t r = u / plan.kv_heads, kv = u % plan.kv_heads, last = places[r] + 1;
            const int64_t first = layer.window ? max_<int64_t>(0, last - layer.window) : 0, at = slots[r] * plan.slot_stride + kv * D;
            attend(to.qkv + r * to.qkv_width + kv * group * D, D, layer.keys + at, layer.values + at, step, first, last, group, D, layer.scale,
                   plan.cap, to.mixed + r * queries + kv * group * D, scores.get(round_up(last - first, 16)));
        }
        barrier();
    }
    void mlp(const LayerPlan& layer) const {
        // Each thread activates the columns that it made itself: no barrier between.
        const int64_t W = plan.wide;
        float* up = plan.gated ? to.wide + rows * W : to.wide;
        if (plan.gated) multiply_adapted(to.normed, plan.hidden, layer.gate, &LayerAdapter::gate, {to.wide, W});
        multiply_adapted(to.normed, plan.hidden, layer.up, &LayerAdapter::up, {up, W});
        const auto [from, end] = share_of(W, thread, threads);
        for (int64_t r = 0; r < rows && from < end; r++)
            activate_all(to.wide + r * W + from, plan.gated ? up + r * W + from : nullptr, end - from, plan.activation);
        barrier();
    }
    void run(const LayerPlan& layer) const {
        norm_rows(layer.attention_in, to.x, to.normed, plan.hidden);
        project(layer);
        place(layer);
        attention(layer);
        add_block(to.mixed, plan.heads * plan.width, layer.o, &LayerAdapter::o, layer.attention_out);
        norm_rows(layer.mlp_in, to.x, to.normed, plan.hidden);
        mlp(layer);
        add_block(to.wide, plan.wide, layer.down, &LayerAdapter::down, layer.mlp_out);
    }
};

}  // namespace

// Tokens ids [rows] at `places` [rows] of the cache's `slots` [rows]; rows of one slot are in order and follow what is cached.
// `adapters` [rows] are addresses of each row's LayerAdapter [layers], or 0; none where no row has one.
// Writes hidden states after the last norm to hidden [rows,H] where asked, and the logits of rows wanted [n] to logits [n,V].
EXPORT void decoder_forward(const DecoderPlan* plan, const int64_t* ids, const int64_t* slots, const int64_t* places,
                            const LayerAdapter* const* adapters, int64_t rows, const int64_t* wanted, int64_t n, float* logits,
                            float* hidden) {
    static thread_local Scratch memory;
    const int64_t H = plan->hidden, queries = plan->heads * plan->width, V = plan->head.out;
    const int64_t qkv = queries + 2 * plan->kv_heads * plan->width;
    Buffers to;
    to.qkv_width = qkv;
    float* at = memory.get(rows * (3 * H + qkv + queries + 2 * plan->wide) + n * H);
    for (auto [part, width] : {std::pair<float**, int64_t>{&to.x, H}, {&to.normed, H}, {&to.block, H}, {&to.qkv, qkv},
                               {&to.mixed, queries}, {&to.wide, 2 * plan->wide}}) {
        *part = at;
        at += rows * width;
    }
    float* chosen = at;
    Meeting meeting;
    const auto work = [&](int thread, int threads) {
        FlushDenormals flush;
        static thread_local Scratch scores;
        Worker worker{*plan, to, slots, places, adapters, rows, thread, threads, scores, meeting};
        worker.each_row([&](int64_t r) {
            const float *e = plan->embeddings + ids[r] * H, *p = plan->positions ? plan->positions + places[r] * H : nullptr;
            for (int64_t i = 0; i < H; i++) to.x[r * H + i] = e[i] * plan->embedding_scale + (p ? p[i] : 0.0f);
        });
        worker.barrier();
        for (; worker.depth < plan->count; worker.depth++) worker.run(plan->layers[worker.depth]);
        worker.norm_rows(plan->last, to.x, to.normed, H);
        if (hidden)
            worker.each_row([&](int64_t r) { memcpy(hidden + r * H, to.normed + r * H, H * 4); });
        if (thread == 0)
            for (int64_t i = 0; i < n; i++) memcpy(chosen + i * H, to.normed + wanted[i] * H, H * 4);
        worker.barrier();
        if (n) multiply(chosen, H, n, plan->head, thread, threads, {logits, V});
        if (n && (plan->logit_cap || plan->logit_scale != 1.0f)) {
            worker.barrier();
            for (int64_t i = n * V * thread / threads; i < n * V * (thread + 1) / threads; i++) {
                const float y = logits[i] * plan->logit_scale;
                logits[i] = plan->logit_cap ? plan->logit_cap * tanhf(y / plan->logit_cap) : y;
            }
        }
    };
#ifdef _OPENMP
    const int threads = (int)plan->threads;
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        work(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    work(0, 1);
}
