/* The product of a few rows with a panel of COLUMNS columns, which every matrix product here is made of.
 *
 * Both sides are read in units of 4 bytes, of which `steps` are summed over: a float32, or two bfloat16 that are neighbours in
 * depth. So the code is the same for both, but for the multiplication itself. A panel is (steps, COLUMNS) units. */

#pragma once

#include "common.h"

/* sum + x * y, per lane; low: both products of the pairs. Processors without it never come here with low (has_bfloat16). */
INLINE vec multiply_add(int low, const float *x, vec y, vec sum) {
#if defined(__AVX512BF16__)
    if (low) {
        int32_t pair;
        memcpy(&pair, x, 4);
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)y);
    }
#endif
    return *x * y + sum;
}

/* sums (rows, COLUMNS) = a . panel, where unit (r, k) of a is a[r * a_row + k * a_step]. halves: 1 for the first LANES columns. */
INLINE void tile(int rows, int halves, int low, int64_t steps, const float *a, int64_t a_row, int64_t a_step, const float *panel,
                 vec sums[][2]) {
    UNROLL for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = (vec){0};
    for (int64_t k = 0; k < steps; k++) {
        vec left = *(const vec *)(panel + k * COLUMNS), right = halves == 2 ? *(const vec *)(panel + k * COLUMNS + LANES) : left;
        UNROLL for (int r = 0; r < rows; r++) {
            const float *x = a + r * a_row + k * a_step;
            sums[r][0] = multiply_add(low, x, left, sums[r][0]);
            if (halves == 2) sums[r][1] = multiply_add(low, x, right, sums[r][1]);
        }
    }
}

/* The first `columns` of each row of sums: c = sums + bias, or c += that. c: element (r, j) at c[r * stride + j]. */
INLINE void store(int rows, vec sums[][2], const float *bias, void *c, int64_t stride, int64_t columns, int add, int low) {
    UNROLL for (int r = 0; r < rows; r++) {
        void *out = at(c, r * stride, low);
        if (columns == COLUMNS && !bias) {
            put_vec(out, 0, add ? get_vec(out, 0, low) + sums[r][0] : sums[r][0], low);
            put_vec(out, LANES, add ? get_vec(out, LANES, low) + sums[r][1] : sums[r][1], low);
        } else
            for (int64_t j = 0; j < columns; j++) {
                float sum = j < LANES ? sums[r][0][j] : sums[r][1][j - LANES];
                put(out, j, (add ? get(out, j, low) : 0) + sum + (bias ? bias[j] : 0), low);
            }
    }
}

/* ---- laying out a panel: unit (k, j) holds element (column j, depth k), or the pair of depths 2k and 2k + 1 if low; zeros beyond
 * `columns` and `depth` ---- */

INLINE float pair_of(uint16_t first, uint16_t second) {
    uint32_t both = first | (uint32_t)second << 16;
    float unit;
    memcpy(&unit, &both, 4);
    return unit;
}

/* From float32: element (j, k) is x[j * column_step + k * depth_step]. */
INLINE void pack_floats(int low, int64_t columns, int64_t depth, const float *x, int64_t column_step, int64_t depth_step, float *panel) {
    for (int64_t k = 0; k < depth; k += 1 + low, panel += COLUMNS)
        for (int64_t j = 0; j < COLUMNS; j++) {
            const float *unit = x + j * column_step + k * depth_step;
            if (low)
                panel[j] = j < columns ? pair_of(rounded(unit[0]), k + 1 < depth ? rounded(unit[depth_step]) : 0) : 0;
            else
                panel[j] = j < columns ? *unit : 0;
        }
}

/* From rows that are columns of the panel, each with its depth in a row: units are moved as they are. row: units to the next. */
INLINE void pack_rows(int64_t columns, int64_t steps, const float *x, int64_t row, float *panel) {
    for (int64_t j = 0; j < columns; j++)
        for (int64_t k = 0; k < steps; k++) panel[k * COLUMNS + j] = x[j * row + k];
    for (int64_t j = columns; j < COLUMNS; j++)
        for (int64_t k = 0; k < steps; k++) panel[k * COLUMNS + j] = 0;
}

/* `width` units, of which the first `columns` come from one row of x, or from two that are paired if low. */
INLINE void zip(int low, int64_t width, int64_t columns, const void *x, int64_t row, int paired, float *out) {
    int64_t j = 0;
    const uint16_t *even = x, *odd = even + row;
    for (; j + LANES <= columns && (!low || paired); j += LANES) {
        if (low) {
            uvec first = __builtin_convertvector(*(const low_vec *)(even + j), uvec);
            uvec second = __builtin_convertvector(*(const low_vec *)(odd + j), uvec);
            *(uvec *)(out + j) = first | second << 16;
        } else
            *(vec *)(out + j) = *(const vec *)((const float *)x + j);
    }
    for (; j < columns; j++) out[j] = low ? pair_of(even[j], paired ? odd[j] : 0) : ((const float *)x)[j];
    for (; j < width; j++) out[j] = 0;
}

/* From rows that are the depth, each with the columns in a row: `width` units a step. row: elements to the next. */
INLINE void pack_depth(int low, int64_t width, int64_t columns, int64_t depth, const void *x, int64_t row, float *panel) {
    for (int64_t k = 0; k < depth; k += 1 + low, panel += width) zip(low, width, columns, at(x, k * row, low), row, k + 1 < depth, panel);
}
