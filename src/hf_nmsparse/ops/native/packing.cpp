// SPDX-License-Identifier: Apache-2.0
// Masks of n:m and packed 2:4 weights on the CPU; packing.py says what is computed, docs/FORMAT.md how it lies in memory.
//
// Everything passes through the word of a group: the m bits of its mask, position p at bit p. Blocks of up to LANES groups of a
// row are read from scores, a mask, codes or packed codes, and written as a mask, codes, packed codes, or kept values with their
// ids. Numbers are compared and copied as integers, so values stay as they are to the bit and NaN has its place in the order.
// Plain loops over the lanes, which compilers turn into vectors; with AVX-512, groups of four are chosen from and kept values
// moved by instructions made for it.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__) && defined(__BMI2__)
#define WITH_AVX512 1
#endif

namespace {

using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

constexpr int LANES = 64;           // groups that are worked on together; even, as a byte of ids has two
constexpr int MOST_POSITIONS = 16;  // m
// Weights; below, waking other threads costs more than they bring.
[[maybe_unused]] constexpr int64_t SMALL = 1 << 16;

#define EACH_LANE for (int l = 0; l < LANES; ++l)

enum Type : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Packing {  // `_Packing` of native_packing.py
    // One of these is read.
    const void* scores;      // [rows, in_features]
    const uint8_t* mask;     // [rows, in_features], non-zero: kept
    const int64_t* codes;    // [rows, groups]
    const uint8_t* packed;   // [rows, row_bytes]
    // Written where not null.
    uint8_t* to_mask;
    int64_t* to_codes;
    uint8_t* to_packed;
    void* values;            // of 2:4 alone, like the two below: [rows, in_features / 2], of the weight
    uint8_t* ids;            // [rows, in_features / 8]
    uint8_t* small_codes;    // [rows, groups]
    const void* weight;      // [rows, in_features]
    const int32_t* code_of_word;   // [2^m], -1 where the word does not keep n
    const uint16_t* word_of_code;  // [candidates]
    int64_t rows, in_features, row_bytes;
    int64_t filled, refused;  // out: groups that kept too few; groups that no result can be had of
    int n, m, candidates, run, run_bytes;  // `run` codes in `run_bytes`
    Type score_type, weight_type;
    int magnitudes;  // whether it is the magnitudes of the scores that count
    int complete;    // whether to fill groups that keep too few
    int check;       // whether packed codes may be damaged
    int threads;

    int64_t groups() const { return (in_features + m - 1) / m; }
};

struct Block {
    int64_t row, group;  // the first
    int count;           // groups
    int64_t weights;     // columns, of which the last group may lack some
    int tail;            // weights of the last group if it is shorter, else 0
    uint16_t words[LANES];
    int32_t codes[LANES];
};

// --- words of scores --------------------------------------------------------------------------------------------------
// Integers in the order of the numbers: -0 equals 0, every NaN is alike and above infinity.
template <typename Bits, Bits INF>
inline Bits key_of(Bits bits, bool magnitudes) {
    const Bits magnitude = bits & std::numeric_limits<Bits>::max();
    const Bits key = magnitudes || bits >= 0 ? magnitude : static_cast<Bits>(-magnitude);
    return magnitude > INF ? static_cast<Bits>(INF + 1) : key;
}

// The n highest of each group of M (0: of m); of equals the first. `beaten`: how many of its group beat a position.
template <typename Key, int M>
void choose(const Key* keys, int n, int m, uint16_t* words) {
    Key planes[MOST_POSITIONS][LANES], beaten[MOST_POSITIONS][LANES];
    if (M) m = M;
    EACH_LANE for (int j = 0; j < m; ++j) planes[j][l] = keys[l * m + j];
    for (int j = 0; j < m; ++j) EACH_LANE beaten[j][l] = static_cast<Key>(j);  // by all before it, until one loses
    for (int i = 0; i < m; ++i)
        for (int j = i + 1; j < m; ++j)
            EACH_LANE {
                const Key later_wins = planes[j][l] > planes[i][l];
                beaten[i][l] += later_wins;
                beaten[j][l] -= later_wins;
            }
    EACH_LANE words[l] = 0;
    for (int j = 0; j < m; ++j)
        EACH_LANE words[l] = static_cast<uint16_t>(words[l] | (beaten[j][l] < n ? 1 << j : 0));
}

#if WITH_AVX512
// The same for n of 4: a group lies in 64 or 128 bits, so all its pairs meet by rotating it.
template <typename Key>
void choose_of_four(const Key* keys, int n, uint16_t* words) {
    constexpr int WEIGHTS = 64 / sizeof(Key);
    // One where the rotation by 1, 2, 3 brings a weight from before, which wins if equal.
    const __m512i before[3] = {
        sizeof(Key) == 2 ? _mm512_set1_epi64(0x0001000000000000) : _mm512_set4_epi32(1, 0, 0, 0),
        sizeof(Key) == 2 ? _mm512_set1_epi64(0x0001000100000000) : _mm512_set4_epi32(1, 1, 0, 0),
        sizeof(Key) == 2 ? _mm512_set1_epi64(0x0001000100010000) : _mm512_set4_epi32(1, 1, 1, 0),
    };
    for (int at = 0; at < 4 * LANES; at += WEIGHTS) {
        const __m512i own = _mm512_loadu_si512(keys + at);
        uint64_t a, b, c;  // whether it is beaten by the one of each rotation
        if constexpr (sizeof(Key) == 2) {
            a = _mm512_cmpgt_epi16_mask(_mm512_ror_epi64(own, 16), _mm512_sub_epi16(own, before[0]));
            b = _mm512_cmpgt_epi16_mask(_mm512_ror_epi64(own, 32), _mm512_sub_epi16(own, before[1]));
            c = _mm512_cmpgt_epi16_mask(_mm512_ror_epi64(own, 48), _mm512_sub_epi16(own, before[2]));
        } else {
            a = _mm512_cmpgt_epi32_mask(_mm512_shuffle_epi32(own, _MM_PERM_ADCB), _mm512_sub_epi32(own, before[0]));
            b = _mm512_cmpgt_epi32_mask(_mm512_shuffle_epi32(own, _MM_PERM_BADC), _mm512_sub_epi32(own, before[1]));
            c = _mm512_cmpgt_epi32_mask(_mm512_shuffle_epi32(own, _MM_PERM_CBAD), _mm512_sub_epi32(own, before[2]));
        }
        const uint64_t bits = ~(n == 1 ? a | b | c : n == 2 ? (a & b) | (a & c) | (b & c) : a & b & c);
        for (int i = 0; i < WEIGHTS; i += 16) {
            const uint64_t four = _pdep_u64(bits >> i, 0x000f000f000f000f);
            std::memcpy(words + (at + i) / 4, &four, 8);
        }
    }
}
#endif

template <typename Bits, Bits INF>
void words_of_scores(const Packing& p, Block& block) {
    const Bits* scores = static_cast<const Bits*>(p.scores) + block.row * p.in_features + block.group * p.m;
    Bits keys[LANES * MOST_POSITIONS];
    if (p.magnitudes) for (int64_t i = 0; i < block.weights; ++i) keys[i] = key_of<Bits, INF>(scores[i], true);
    else for (int64_t i = 0; i < block.weights; ++i) keys[i] = key_of<Bits, INF>(scores[i], false);
    std::fill(keys + block.weights, keys + LANES * p.m, static_cast<Bits>(-std::numeric_limits<Bits>::max()));
#if WITH_AVX512
    if (p.m == 4) return choose_of_four<Bits>(keys, p.n, block.words);
#endif
    if (p.m == 4) choose<Bits, 4>(keys, p.n, 4, block.words);
    else if (p.m == 8) choose<Bits, 8>(keys, p.n, 8, block.words);
    else if (p.m == 16) choose<Bits, 16>(keys, p.n, 16, block.words);
    else choose<Bits, 0>(keys, p.n, p.m, block.words);
}

// --- words of masks and codes -----------------------------------------------------------------------------------------
void words_of_mask(const Packing& p, Block& block) {
    const uint8_t* mask = p.mask + block.row * p.in_features + block.group * p.m;
    uint8_t kept[LANES * MOST_POSITIONS], bits[LANES * MOST_POSITIONS / 8 + 4] = {};
    for (int64_t i = 0; i < block.weights; ++i) kept[i] = mask[i] != 0;
    std::fill(kept + block.weights, kept + LANES * p.m, uint8_t{0});
    for (int i = 0; i < LANES * p.m / 8; ++i) {
        uint64_t eight;
        std::memcpy(&eight, kept + 8 * i, 8);
        bits[i] = static_cast<uint8_t>(eight * 0x0102040810204080u >> 56);  // bit j is byte j
    }
    EACH_LANE {
        uint32_t here;
        std::memcpy(&here, bits + l * p.m / 8, 4);
        block.words[l] = static_cast<uint16_t>((here >> l * p.m % 8) & ((1u << p.m) - 1));
    }
}

// How many groups no code stands for.
int64_t read_codes(const Packing& p, Block& block) {
    const int64_t* codes = p.codes + block.row * p.groups() + block.group;
    int64_t refused = 0;
    for (int l = 0; l < block.count; ++l) {
        const bool there = codes[l] >= 0 && codes[l] < p.candidates;
        refused += !there;
        block.codes[l] = there ? static_cast<int32_t>(codes[l]) : 0;
    }
    return refused;
}

// Of a run of codes, the number that its bytes are: sum of code_i * C^i. `C`: the candidates, where they are known beforehand.
template <int C>
int64_t read_packed(const Packing& p, Block& block) {
    const uint64_t candidates = C ? C : static_cast<uint64_t>(p.candidates);
    const uint8_t* row = p.packed + block.row * p.row_bytes;
    int64_t refused = 0;
    for (int first = 0; first < block.count; first += p.run) {
        const int64_t at = (block.group + first) / p.run * p.run_bytes;
        uint64_t number = 0;
        std::memcpy(&number, row + at, std::min<int64_t>(p.run_bytes, p.row_bytes - at));
        const int there = std::min(p.run, block.count - first);
        for (int i = 0; i < there; ++i, number /= candidates) block.codes[first + i] = static_cast<int32_t>(number % candidates);
        refused += number != 0;
    }
    if (block.tail) {
        const int32_t code = block.codes[block.count - 1];
        refused += block.tail < p.n ? code != 0 : p.word_of_code[code] >> block.tail != 0;
    }
    return p.check ? refused : 0;
}

int bits_of(uint32_t word) {
    int count = 0;
    for (; word; word &= word - 1) ++count;
    return count;
}

// Fills groups that keep too few, lowest index first, and counts them; returns how many keep too many.
int64_t complete(const Packing& p, Block& block, int64_t& filled) {
    int64_t over = 0;
    for (int l = 0; l < block.count; ++l) {
        uint32_t word = block.words[l];
        const int expected = block.tail && l == block.count - 1 ? std::min(p.n, block.tail) : p.n;
        int kept = bits_of(word);
        over += kept > expected;
        filled += kept < expected;
        for (; kept < expected; ++kept) word |= word + 1;  // its lowest zero
        block.words[l] = static_cast<uint16_t>(word);
    }
    return over;
}

// --- what is written --------------------------------------------------------------------------------------------------
struct Spread {  // the eight bits of a byte as bytes
    uint64_t of[256];
    constexpr Spread() : of() {
        for (int byte = 0; byte < 256; ++byte)
            for (int j = 0; j < 8; ++j) of[byte] |= static_cast<uint64_t>(byte >> j & 1) << (8 * j);
    }
};
constexpr Spread SPREAD;

void write_mask(const Packing& p, const Block& block) {
    uint8_t bytes[(LANES + 1) * MOST_POSITIONS];
    EACH_LANE {  // beyond its m bytes a group writes on the next one, which is yet to come
        std::memcpy(bytes + l * p.m, &SPREAD.of[block.words[l] & 255], 8);
        if (p.m > 8) std::memcpy(bytes + l * p.m + 8, &SPREAD.of[block.words[l] >> 8], 8);
    }
    std::memcpy(p.to_mask + block.row * p.in_features + block.group * p.m, bytes, block.weights);
}

void write_packed(const Packing& p, const Block& block) {
    uint8_t* row = p.to_packed + block.row * p.row_bytes;
    for (int first = 0; first < block.count; first += p.run) {
        const int64_t at = (block.group + first) / p.run * p.run_bytes;
        uint64_t number = 0;
        for (int i = std::min(p.run, block.count - first) - 1; i >= 0; --i)
            number = number * p.candidates + block.codes[first + i];
        std::memcpy(row + at, &number, std::min<int64_t>(p.run_bytes, p.row_bytes - at));
    }
}

// The two kept of each four weights.
template <typename Bits>
void write_values(const Packing& p, const Block& block) {
    const Bits* weight = static_cast<const Bits*>(p.weight) + block.row * p.in_features + 4 * block.group;
    Bits* values = static_cast<Bits*>(p.values) + block.row * (p.in_features / 2) + 2 * block.group;
    int l = 0;
#if WITH_AVX512
    const auto sixteen = [&](int from) {  // the words of four groups, one bit a weight
        uint64_t words;
        std::memcpy(&words, block.words + from, 8);
        return static_cast<uint32_t>(_pext_u64(words, 0x000f000f000f000f));
    };
    if constexpr (sizeof(Bits) == 2) {
        for (; l + 8 <= block.count; l += 8) {
            const __m512i kept = _mm512_maskz_compress_epi16(sixteen(l) | sixteen(l + 4) << 16, _mm512_loadu_si512(weight + 4 * l));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + 2 * l), _mm512_castsi512_si256(kept));
        }
    } else {
        for (; l + 4 <= block.count; l += 4) {
            const __m512i kept = _mm512_maskz_compress_epi32(static_cast<__mmask16>(sixteen(l)), _mm512_loadu_si512(weight + 4 * l));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + 2 * l), _mm512_castsi512_si256(kept));
        }
    }
#endif
    for (; l < block.count; ++l) {
        const int word = block.words[l], first = word & 1 ? 0 : word & 2 ? 1 : 2, second = word & 8 ? 3 : word & 4 ? 2 : 1;
        values[2 * l] = weight[4 * l + first];
        values[2 * l + 1] = weight[4 * l + second];
    }
}

void write_ids(const Packing& p, const Block& block) {
    uint16_t ids[LANES];
    uint8_t codes[LANES], bytes[LANES / 2];
    EACH_LANE {
        const uint16_t word = block.words[l];
        const uint16_t first = word & 1 ? 0 : word & 2 ? 1 : 2, second = word & 8 ? 3 : word & 4 ? 2 : 1;
        ids[l] = static_cast<uint16_t>(first | second << 2);
        codes[l] = static_cast<uint8_t>(first + second - (first == 0));
    }
    for (int e = 0; e < LANES / 2; ++e) bytes[e] = static_cast<uint8_t>(ids[2 * e] | ids[2 * e + 1] << 4);
    std::memcpy(p.ids + block.row * (p.in_features / 8) + block.group / 2, bytes, block.count / 2);
    if (p.small_codes) std::memcpy(p.small_codes + block.row * p.groups() + block.group, codes, block.count);
}

// --- blocks -----------------------------------------------------------------------------------------------------------
// Words, and codes where they are wanted; how many groups were refused.
int64_t read(const Packing& p, Block& block, int64_t& filled) {
    int64_t refused = 0;
    if (p.codes || p.packed) {
        if (p.codes) refused = read_codes(p, block);
        else refused = p.candidates == 6 ? read_packed<6>(p, block) : read_packed<0>(p, block);
        if (p.to_mask) for (int l = 0; l < block.count; ++l) block.words[l] = p.word_of_code[block.codes[l]];
        return refused;
    }
    if (p.mask) words_of_mask(p, block);
    else if (p.score_type == FLOAT32) words_of_scores<int32_t, 0x7f800000>(p, block);
    else if (p.score_type == BFLOAT16) words_of_scores<int16_t, 0x7f80>(p, block);
    else words_of_scores<int16_t, 0x7c00>(p, block);
    if (p.complete) return complete(p, block, filled);
    if (p.mask && block.tail && block.tail < p.n)  // all of the tail is kept: code 0 stands for it
        block.words[block.count - 1] |= static_cast<uint16_t>((1 << p.n) - (1 << block.tail));
    if (p.to_codes || p.mask) {
        for (int l = 0; l < block.count; ++l) block.codes[l] = p.code_of_word[block.words[l]];
        for (int l = 0; l < block.count; ++l) refused += block.codes[l] < 0;
    }
    return refused;
}

void write(const Packing& p, const Block& block) {
    if (p.to_mask) write_mask(p, block);
    if (p.to_codes) {
        int64_t* codes = p.to_codes + block.row * p.groups() + block.group;
        for (int l = 0; l < block.count; ++l) codes[l] = block.codes[l];
    }
    if (p.to_packed) write_packed(p, block);
    if (!p.values) return;
    if (p.weight_type == FLOAT32) write_values<int32_t>(p, block);
    else write_values<int16_t>(p, block);
    write_ids(p, block);
}

}  // namespace

extern "C" void nmsparse_packing(Packing* packing) {
    Packing& p = *packing;
    const int64_t groups = p.groups();
    const int step = p.packed || p.to_packed ? LANES / p.run * p.run : LANES;  // whole runs
    int64_t filled = 0, refused = 0;
#pragma omp parallel for schedule(static) reduction(+ : filled, refused) num_threads(p.rows * p.in_features < SMALL ? 1 : p.threads)
    for (int64_t row = 0; row < p.rows; ++row)
        for (int64_t group = 0; group < groups; group += step) {
            Block block;
            block.row = row;
            block.group = group;
            block.count = static_cast<int>(std::min<int64_t>(step, groups - group));
            block.weights = std::min<int64_t>(block.count * p.m, p.in_features - group * p.m);
            block.tail = static_cast<int>(block.weights % p.m);
            std::memset(block.words, 0, sizeof block.words);
            refused += read(p, block, filled);
            write(p, block);
        }
    p.filled = filled;
    p.refused = refused;
}
