// SPDX-License-Identifier: Apache-2.0
// A step of MaskAdamW on the CPU: each number is read and written once. The formulas are those of training/optimizers.py, the
// rounding is that of rounding.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#include "vectors.inc"

constexpr int BLOCK = 256, VECTORS = BLOCK / LANES, PER_CALL = 8;
constexpr float SMALLEST_SCALE = 1e-30f;

struct AdamW {  // `_AdamW` of native_adamw.py
    void* values;
    const void* grad;
    void *mean, *root;  // [blocks, BLOCK], the last one padded: float, or with scales int8 and uint8
    float *mean_scale, *root_scale;
    int64_t count;
    Type type;  // of values and grad
    float decay, mean_weight, root_weight, root_factor, rate, epsilon;
    uint32_t seed, layer, step;
    int threads;
};

// Sixteen random bits of each value of a block: `random_bits` of rounding.py.
void draw(const AdamW& p, int64_t block, uint16_t* bits) {
    constexpr int CALLS = BLOCK / PER_CALL;
    for (int first = 0; first < CALLS; first += LANES) {
        const uint64_t call = static_cast<uint64_t>(block * CALLS + first);  // LANES calls do not cross a multiple of 2^32
        Words c0, c1 = Words{} + static_cast<uint32_t>(call >> 32), c2 = Words{} + p.step, c3 = {};
        for (int l = 0; l < LANES; ++l) c0[l] = static_cast<uint32_t>(call) + static_cast<uint32_t>(group_of_lane<4>(l));
        philox(p.seed, p.layer, c0, c1, c2, c3);
        const Floats planes[4] = {bits_of<Floats>(c0), bits_of<Floats>(c1), bits_of<Floats>(c2), bits_of<Floats>(c3)};
        Floats words[4];
        to_weights<4>(4, planes, words);
        std::memcpy(bits + first * PER_CALL, words, sizeof words);
    }
}

INLINE Floats magnitude(Floats x) { return bits_of<Floats>(bits_of<Words>(x) & 0x7fffffff); }

using Signed = int8_t __attribute__((vector_size(LANES)));
using Unsigned = uint8_t __attribute__((vector_size(LANES)));
template <typename Codes>
constexpr float highest = std::is_same<Codes, Signed>::value ? 127 : 255;

// `from_codes` and `to_codes` of rounding.py, of one block.
template <typename Codes>
void decode(const void* codes, int64_t block, float scale, float lowest, Floats* values) {
    const float unit = scale / (highest<Codes> * highest<Codes>);
    for (int v = 0; v < VECTORS; ++v) {
        Codes stored;
        std::memcpy(&stored, static_cast<const char*>(codes) + block * BLOCK + v * LANES, sizeof stored);
        const Floats code = larger(__builtin_convertvector(__builtin_convertvector(stored, Ints), Floats), all(lowest));
        values[v] = code * magnitude(code) * unit;
    }
}

template <typename Codes>
void encode(const Floats* values, const uint16_t* bits, int shift, int64_t block, void* codes, float& scale) {
    Floats largest = {};
    Ints broken = {};
    for (int v = 0; v < VECTORS; ++v) {
        largest = larger(largest, magnitude(values[v]));
        broken |= values[v] != values[v];
    }
    scale = SMALLEST_SCALE;
    for (int l = 0; l < LANES; ++l) scale = broken[l] ? NAN : std::max(scale, largest[l]);
    const float factor = highest<Codes> * highest<Codes> / scale;
    for (int v = 0; v < VECTORS; ++v) {
        Halves halves;
        std::memcpy(&halves, bits + v * LANES, sizeof halves);
        const Ints random = bits_of<Ints>(__builtin_convertvector(halves, Words) >> shift & 0xff);
        const Floats square = magnitude(values[v]) * factor;
        const Floats lower = __builtin_convertvector(__builtin_convertvector(root_of(square), Ints), Floats);
        // The squares of the neighbours are 2 k + 1 apart.
        const Floats place = (__builtin_convertvector(random, Floats) + 0.5f) * 0.00390625f;
        const Floats threshold = (lower * 2 + 1) * place + lower * lower;
        const Floats code = square > threshold ? lower + 1 : lower;
        const Floats with_sign = values[v] < 0.0f ? -code : code;
        const Codes stored = __builtin_convertvector(__builtin_convertvector(with_sign, Ints), Codes);
        std::memcpy(static_cast<char*>(codes) + block * BLOCK + v * LANES, &stored, sizeof stored);
    }
}

void update(const AdamW& p, int64_t block) {
    const int64_t start = block * BLOCK;
    Floats mean[VECTORS], root[VECTORS];
    if (p.mean_scale) {
        decode<Signed>(p.mean, block, p.mean_scale[block], -128, mean);
        // At least the lowest code: a root of 0 beside a mean that is not would make an enormous update.
        decode<Unsigned>(p.root, block, p.root_scale[block], 1, root);
    } else {
        std::memcpy(mean, static_cast<const float*>(p.mean) + start, sizeof mean);
        std::memcpy(root, static_cast<const float*>(p.root) + start, sizeof root);
    }
    alignas(64) uint16_t bits[BLOCK];
    if (p.mean_scale || p.type == BFLOAT16) draw(p, block, bits);
    for (int v = 0; v < VECTORS; ++v) {
        const int64_t at = start + v * LANES, left = p.count - at;
        const Floats grad = load(p.type, p.grad, at, left);
        mean[v] += (grad - mean[v]) * p.mean_weight;
        root[v] = root_of(root[v] * root[v] * (1 - p.root_weight) + grad * grad * p.root_weight);
        const Floats direction = mean[v] / (root[v] * p.root_factor + p.epsilon);
        const Floats value = load(p.type, p.values, at, left) * p.decay - direction * p.rate;
        if (p.type == FLOAT32) {
            store(value, p.type, p.values, at, left);
            continue;
        }
        Halves halves;
        std::memcpy(&halves, bits + v * LANES, sizeof halves);
        // The carry out of the 16 bits that are cut off rounds away from 0. NaN stays.
        const Words given = bits_of<Words>(value), carried = given + __builtin_convertvector(halves, Words);
        const Words quiet = given | 0x400000;
        const Halves rounded = __builtin_convertvector((value == value ? carried : quiet) >> 16, Halves);
        uint16_t* to = static_cast<uint16_t*>(p.values) + at;
        std::memcpy(to, &rounded, sizeof(uint16_t) * static_cast<size_t>(std::clamp<int64_t>(left, 0, LANES)));
    }
    if (p.mean_scale) {
        encode<Signed>(mean, bits, 0, block, p.mean, p.mean_scale[block]);
        encode<Unsigned>(root, bits, 8, block, p.root, p.root_scale[block]);
    } else {
        std::memcpy(static_cast<float*>(p.mean) + start, mean, sizeof mean);
        std::memcpy(static_cast<float*>(p.root) + start, root, sizeof root);
    }
}

}  // namespace

extern "C" void nmsparse_adamw(const AdamW* p) {
    const int64_t blocks = (p->count + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int64_t block = 0; block < blocks; ++block) update(*p, block);
}
