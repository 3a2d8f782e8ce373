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

/* sums (rows, COLUMNS) = a . panel, where unit (r, k) of a is a[r * a_row + k * a_step]. */
INLINE void tile(int rows, int low, int64_t steps, const float *a, int64_t a_row, int64_t a_step, const float *panel,
                 vec sums[][2]) {
    UNROLL for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = (vec){0};
    for (int64_t k = 0; k < steps; k++) {
        vec left = *(const vec *)(panel + k * COLUMNS), right = *(const vec *)(panel + k * COLUMNS + LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            const float *x = a + r * a_row + k * a_step;
            sums[r][0] = multiply_add(low, x, left, sums[r][0]);
            sums[r][1] = multiply_add(low, x, right, sums[r][1]);
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

/* A panel from a matrix: unit (k, j) of `panel` holds element (column j, depth k), or (2k, 2k + 1) if low; zeros beyond `columns`
 * and `depth`. Element (j, k) is x[j * column_step + k * depth_step], in bfloat16 if x_low. */
INLINE void pack_panel(int low, int x_low, int64_t columns, int64_t depth, const void *x, int64_t column_step, int64_t depth_step,
                       float *panel) {
    int64_t steps = low ? (depth + 1) / 2 : depth;
    for (int64_t k = 0; k < steps; k++) {
        float *out = panel + k * COLUMNS;
        if (!low) {
            const void *row = at(x, k * depth_step, x_low);
            if (column_step == 1 && columns == COLUMNS)
                for (int j = 0; j < COLUMNS; j += LANES) *(vec *)(out + j) = get_vec(row, j, x_low);
            else
                for (int64_t j = 0; j < COLUMNS; j++) out[j] = j < columns ? get(row, j * column_step, x_low) : 0;
            continue;
        }
        const void *even = at(x, 2 * k * depth_step, x_low), *odd = at(even, depth_step, x_low);
        int paired = 2 * k + 1 < depth;
        if (column_step == 1 && columns == COLUMNS && paired && x_low) {
            for (int j = 0; j < COLUMNS; j += LANES) {
                uvec first = __builtin_convertvector(*(const low_vec *)((const uint16_t *)even + j), uvec);
                uvec second = __builtin_convertvector(*(const low_vec *)((const uint16_t *)odd + j), uvec);
                *(uvec *)(out + j) = first | second << 16;
            }
            continue;
        }
        for (int64_t j = 0; j < COLUMNS; j++) {
            uint32_t first = j < columns ? rounded(get(even, j * column_step, x_low)) : 0;
            uint32_t second = j < columns && paired ? rounded(get(odd, j * column_step, x_low)) : 0;
            uint32_t pair = first | second << 16;
            memcpy(out + j, &pair, 4);
        }
    }
}
