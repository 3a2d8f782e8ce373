/* What every kernel here is made of.
 *
 * Everything is float32, but for what may be bfloat16 (`low`): both sides of a product, which is summed in float32, and what is
 * kept of the attention. `low` is a constant wherever it reaches an inner loop; since OpenMP's regions become functions that get
 * their variables from memory, such loops are in functions of their own (OWN).
 *
 * Every sum runs in an order that depends on its own row alone (or on the number of tokens, for sums over tokens), never on the
 * neighbours of a row or the number of threads. Matrices are row-major. Threads come from the OpenMP runtime that PyTorch has
 * already loaded. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 12 }; /* 24 of 32 registers hold sums */
#else
enum { LANES = 8, ROWS = 6 }; /* 12 of 16 */
#endif
enum { COLUMNS = 2 * LANES };

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t low_vec __attribute__((vector_size(2 * LANES), aligned(2)));
#define INLINE static inline __attribute__((always_inline))
#define OWN static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

typedef float half_vec __attribute__((vector_size(2 * LANES), aligned(4)));
typedef float quarter_vec __attribute__((vector_size(LANES), aligned(4)));

INLINE float total(vec x) {
    half_vec halves[2];
    memcpy(halves, &x, sizeof x);
    half_vec sums = halves[0] + halves[1];
    quarter_vec quarters[2];
    memcpy(quarters, &sums, sizeof sums);
    quarter_vec rest = quarters[0] + quarters[1];
    float sum = 0;
    for (int lane = 0; lane < LANES / 4; lane++) sum += rest[lane];
    return sum;
}

/* The greater of each lane; b where a is NaN. */
INLINE vec higher(vec a, vec b) {
    ivec pick = a > b;
    return (vec)(((ivec)a & pick) | ((ivec)b & ~pick));
}

INLINE float greatest(vec x) {
    float lanes[LANES];
    memcpy(lanes, &x, sizeof x);
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) lanes[lane] = lanes[lane] > lanes[lane + width] ? lanes[lane] : lanes[lane + width];
    return lanes[0];
}

/* exp(x) for x <= 0, to 2 units in the last place; 0 below -87. Cody and Waite's reduction, then a Taylor polynomial. */
INLINE vec exponential(vec x) {
    vec low = (vec){0} - 87.0f;
    ivec tiny = x < low;
    x = (vec)(((ivec)x & ~tiny) | ((ivec)low & tiny)); /* NaN stays */
    vec shifted = x * 1.44269504f - 0.5f;
    ivec power = __builtin_convertvector(shifted, ivec); /* towards 0, and shifted is below 0 */
    vec n = __builtin_convertvector(power, vec);
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 1.0f / 5040 + (vec){0};
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vec result = p * (vec)((power + 127) << 23);
    return (vec)((ivec)result & ~tiny);
}

/* x, or 0 if it is greater. NaN stays. */
INLINE vec at_most_0(vec x) { return (vec)((ivec)x & ~(x > 0.0f)); }

/* 1 / (1 + exp(-x)) */
INLINE vec sigmoid(vec x) {
    vec size = (vec)((ivec)x & 0x7fffffff), e = exponential(-size);
    vec positive = 1.0f / (1.0f + e); /* of |x|; of -|x| it is e times that */
    ivec sign = x >= 0.0f;
    return (vec)(((ivec)positive & sign) | ((ivec)(e * positive) & ~sign));
}

/* ---- float32, or bfloat16 in memory. i counts elements ---- */

INLINE char *at(const void *x, int64_t i, int low) { return (char *)x + i * (low ? 2 : 4); }

INLINE float get(const void *x, int64_t i, int low) {
    if (!low) return ((const float *)x)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE vec get_vec(const void *x, int64_t i, int low) {
    if (!low) return *(const vec *)((const float *)x + i);
    return (vec)(__builtin_convertvector(*(const low_vec *)((const uint16_t *)x + i), uvec) << 16);
}

/* Rounded to nearest, ties to even. NaN stays NaN. */
INLINE uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (value != value ? bits | 0x00400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE void put(void *x, int64_t i, float value, int low) {
    if (low)
        ((uint16_t *)x)[i] = rounded(value);
    else
        ((float *)x)[i] = value;
}

INLINE void put_vec(void *x, int64_t i, vec value, int low) {
    if (!low) {
        *(vec *)((float *)x + i) = value;
        return;
    }
#if defined(__AVX512BF16__)
    __m256bh both = _mm512_cvtneps_pbh((__m512)value);
    memcpy((uint16_t *)x + i, &both, sizeof both);
#else
    uvec bits = (uvec)value, nan = (uvec)(value != value);
    bits = ((bits + 0x7fff + (bits >> 16 & 1)) & ~nan) | ((bits | 0x00400000) & nan);
    *(low_vec *)((uint16_t *)x + i) = __builtin_convertvector(bits >> 16, low_vec);
#endif
}
