// A token of each row of logits, drawn by Gumbel noise from a counter-based generator: Philox4x32-10 (Salmon et al. 2011).
//
// Place p of the vocabulary takes word p / 16 % 4 of block p / 64 * 16 + p % 16, so that vectors of 4, 8 or 16 numbers read blocks that
// lie side by side. The block's counter is (block, token index, sample in two words), its key the seed.
#include "simd.h"
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint64_t vq __attribute__((vector_size(4 * VL)));  // half as many, of which the lower 32 bits count

constexpr uint64_t LOW = 0xFFFFFFFF;
constexpr int64_t BLOCKS = 16, WORDS = 4, GROUP = BLOCKS * WORDS;
// A word w is the uniform number u = (w + 1/2) / 2^32, and noise is -ln(-ln(1 - u)). So -ln(1 - u) lies between 2^-33 and 33 ln 2, and
// noise between -ln(33 ln 2) = -3.12999 and 33 ln 2 = 22.87386, rounding within these bounds.
constexpr float SMALLEST = -3.131f, LARGEST = 22.875f;

INLINE vq low_product(vq a, vq b) {
#if VL == 16
    return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif VL == 8 && defined(__AVX2__)
    return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif VL == 4 && defined(__SSE2__)
    return (vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & LOW) * (b & LOW);
#endif
}
INLINE vq all(uint64_t x) { return x - vq{}; }

struct Counter {
    vq word[WORDS];

    INLINE void rounds(uint32_t key0, uint32_t key1) {
        for (int i = 0; i < 10; i++) {
            const vq a = low_product(word[0], all(0xD2511F53)), b = low_product(word[2], all(0xCD9E8D57));
            word[0] = (b >> 32) ^ word[1] ^ all(key0);
            word[2] = (a >> 32) ^ word[3] ^ all(key1);
            word[1] = b, word[3] = a;
            key0 += 0x9E3779B9, key1 += 0xBB67AE85;
        }
    }
};

// The words of VL blocks, even ones and odd ones apart so that products have room.
INLINE void philox(Counter even, Counter odd, uint64_t key, vu* out) {
    even.rounds((uint32_t)key, (uint32_t)(key >> 32));
    odd.rounds((uint32_t)key, (uint32_t)(key >> 32));
    for (int w = 0; w < WORDS; w++) out[w] = (vu)((even.word[w] & LOW) | (odd.word[w] << 32));
}

// Natural logarithm of a positive normal number to about two units in the last place; of 1 - near where x is closest to 1.
INLINE vf log_(vf x, vf near, vi is_near) {
    const vi bits = (vi)x - 0x3F3504F3;  // from sqrt(1/2) to sqrt(2) the exponent is 0
    const vi exponent = bits >> 23;
    vf f = (vf)((bits & 0x7FFFFF) + 0x3F3504F3) - 1.0f;
    f = (is_near & (exponent == 0)) ? -near : f;
    vf p = splat(-0.0763431042432785f);
    p = p * f + 0.12761501967906952f;
    p = p * f - 0.1316021829843521f;
    p = p * f + 0.14201770722866058f;
    p = p * f - 0.16623355448246002f;
    p = p * f + 0.20001226663589478f;
    p = p * f - 0.250008225440979f;
    p = p * f + 0.3333333134651184f;
    const vf e = __builtin_convertvector(exponent, vf);
    return (f * f * (f * p - 0.5f) - e * 2.12194440e-4f + f) + e * 0.693359375f;
}

// The noise of each word. Of u and 1 - u the one below 1/2 is computed: there a float has all its digits, and it is never 0.
INLINE vf gumbel(vu word) {
    const vi w = (vi)word, upper = w < 0;
    const vf nearer = (__builtin_convertvector(w ^ upper, vf) + 0.5f) * 0x1p-32f;
    const vf exponential = -log_(upper ? nearer : 1.0f - nearer, nearer, ~upper);
    return -log_(exponential, vf{}, vi{});
}

// No less than the noise of each word, for a tenth of its price: -ln(-ln(1 - u)) <= -ln(u), the mantissa's logarithm at least a line.
INLINE vf above(vu word) {
    const vf half = __builtin_convertvector((vi)(word >> 1), vf);
    return __builtin_convertvector((vi)half - 0x4F000000, vf) * (float)(-M_LN2 / (1 << 23)) + 0.001f;
}

// The best places so far. Of equal scores the first place wins, whatever the order in which they come.
struct Best {
    vf score = splat(-INFINITY);
    vi place{};

    INLINE void take(vf other, vi at) {
        const vi better = (other > score) | ((other == score) & (at < place));
        score = better ? other : score;
        place = better ? at : place;
    }
    int64_t token() const {
        int best = 0;
        for (int i = 1; i < VL; i++)
            if (score[i] > score[best] || (score[i] == score[best] && place[i] < place[best])) best = i;
        return place[best];
    }
};

struct Row {
    const float* scores;
    int64_t V;
    float top, temperature;
    const int64_t* key;  // seed, sample, token index
    float* noisy;

    INLINE void words(int64_t block, vu* out) const {
        Counter even, odd;
        for (int i = 0; i < VL / 2; i++) even.word[0][i] = 2 * i;
        even.word[0] += all(block);
        odd.word[0] = even.word[0] + 1;
        const uint64_t sample = (uint64_t)key[1];
        even.word[1] = odd.word[1] = all((uint32_t)key[2]);
        even.word[2] = odd.word[2] = all(sample & LOW);
        even.word[3] = odd.word[3] = all(sample >> 32);
        philox(even, odd, (uint64_t)key[0], out);
    }

    int64_t first_top() const {
        for (int64_t i = 0; i < V; i++)
            if (scores[i] == top) return i;
        return 0;
    }

    // A place is left out only where score + a bound of its noise is below the noisy score of another: adding is monotonic, rounded or
    // not, so the token is the same as without. The largest score is 0 and its noise at least SMALLEST.
    int64_t sampled() const {
        float rest[GROUP];
        const int64_t full = V / GROUP * GROUP;
        for (int64_t i = 0; i < GROUP; i++) rest[i] = full + i < V ? scores[full + i] : -INFINITY;
        Best best;
        float bar = SMALLEST;
        for (int64_t first = 0; first < V; first += GROUP)
            for (int64_t lane = 0; lane < BLOCKS; lane += VL) {
                const float* at = (first < full ? scores + first : rest) + lane;
                vf z[WORDS], most = splat(-INFINITY);
                for (int w = 0; w < WORDS; w++) most = vmax(z[w] = (load(at + w * BLOCKS) - top) / temperature, most);
                if (!noisy && max_of(most) + LARGEST < bar) continue;
                vu word[WORDS];
                words(first / WORDS + lane, word);
                most = splat(-INFINITY);
                for (int w = 0; w < WORDS; w++) most = vmax(z[w] + above(word[w]), most);
                if (!noisy && max_of(most) < bar) continue;
                for (int w = 0; w < WORDS; w++) {
                    const int64_t place = first + w * BLOCKS + lane;
                    const vf score = z[w] + gumbel(word[w]);
                    best.take(score, iota() + (int32_t)place);
                    if (noisy) store_some(noisy + place, score, max_<int64_t>(0, min_<int64_t>(VL, V - place)));
                }
                bar = max_(bar, max_of(best.score));
            }
        return best.token();
    }
};

}  // namespace

// tokens[r]: the largest of (scores - top) / temperature + noise in row r of V (`stride` floats apart), top [rows] being its largest score;
// temperature 0: the first of the largest, without noise. keys [rows][3]. With `noisy` [rows][V], the noisy scores too, none left out.
EXPORT void sample(const float* scores, int64_t stride, const float* top, const float* temperature, const int64_t* keys, int64_t* tokens,
                   float* noisy, int64_t rows, int64_t V, int64_t threads) {
    for_each(rows, threads, [=](int64_t r) {
        const Row row{scores + r * stride, V, top[r], temperature[r], keys + r * 3, noisy ? noisy + r * V : nullptr};
        tokens[r] = row.temperature ? row.sampled() : row.first_top();
    });
}

// The generator itself: the four words of each counter [n][4] under one key.
EXPORT void philox_blocks(const uint32_t* counters, int64_t key, uint32_t* out, int64_t n, int64_t threads) {
    for_each((n + VL - 1) / VL, threads, [=](int64_t unit) {
        const int64_t first = unit * VL, count = min_<int64_t>(VL, n - first);
        Counter half[2]{};
        for (int64_t i = 0; i < count; i++)
            for (int w = 0; w < WORDS; w++) half[i % 2].word[w][i / 2] = counters[(first + i) * WORDS + w];
        vu words[WORDS];
        philox(half[0], half[1], (uint64_t)key, words);
        for (int64_t i = 0; i < count; i++)
            for (int w = 0; w < WORDS; w++) out[(first + i) * WORDS + w] = words[w][i];
    });
}
