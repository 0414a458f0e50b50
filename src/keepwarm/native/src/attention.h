// Attention of queries over the keys and values that lie in slabs, in one order of summation.
//
// Keys are taken in chunks of 256 positions. A chunk gives a row its own maximum, sum and output
// from nothing; the chunks' results are merged in order. A score is 8 partial sums over the head
// and then a tree; a chunk's sum of weights likewise over the keys; an output adds keys one after
// the other. Decode and prefill differ in which rows and keys share registers, and in nothing else.
#pragma once
#include "products.h"

#define CHUNK 256
#define MAX_HEAD_DIM 256
#define MAX_HEADS 65536
#define QUERY_ROWS 96  // of a prefill task: that many queries of 64 floats fit the L1 cache

struct AttentionShape {
  int num_heads, num_kv_heads, head_dim;
  bool is_float16;
  int queries_per_head() const { return num_heads / num_kv_heads; }
  int64_t number_bytes() const { return is_float16 ? 2 : 4; }
};

// Of one thread. Rows and keys are padded so that tiles need no ends.
struct AttentionScratch {
  alignas(64) float queries[(QUERY_ROWS + 2) * MAX_HEAD_DIM];
  alignas(64) float keys[CHUNK * MAX_HEAD_DIM];
  alignas(64) float values[CHUNK * MAX_HEAD_DIM];
  alignas(64) float scores[(QUERY_ROWS + 6) * CHUNK];
  alignas(64) float chunk_output[(QUERY_ROWS + 6) * MAX_HEAD_DIM];
  alignas(64) float output[QUERY_ROWS * MAX_HEAD_DIM];
  float maximum[QUERY_ROWS], sum[QUERY_ROWS];
};

template <bool IS_FLOAT16>
INLINE f8 load_kv(const char* p, int i) {
  return IS_FLOAT16 ? f8_from_f16((const uint16_t*)p + i) : load8((const float*)p + i);
}

// Weights of one row from its scores, in place: exp(score - maximum), 0 from `num_seen` on.
INLINE void weigh(float* scores, int num_seen, float* maximum, float* sum) {
  const int padded = (num_seen + 7) / 8 * 8;
  for (int j = num_seen; j < padded; j++) scores[j] = -__builtin_inff();
  f8 largest = load8(scores);
  for (int j = 8; j < padded; j += 8) {
    f8 s = load8(scores + j);
    largest = s > largest ? s : largest;
  }
  const float m = max8(largest);
  f8 total = {};
  for (int j = 0; j < padded; j += 8) {
    f8 s = load8(scores + j);
    f8 weight = exp8(s - m);
    weight = s == -__builtin_inff() ? f8{} : weight;
    store8(scores + j, weight);
    total += weight;
  }
  *maximum = m;
  *sum = sum8(total);
}

// (maximum, sum, output) of a row, and those of its next chunk.
INLINE void merge(float* maximum, float* sum, float* output, float chunk_maximum, float chunk_sum,
                  const float* chunk_output, int head_dim) {
  const float m = *maximum > chunk_maximum ? *maximum : chunk_maximum;
  const f8 scales = exp8(f8{*maximum - m, chunk_maximum - m});
  const float before = scales[0], now = scales[1];
  for (int d = 0; d < head_dim; d += 8)
    store8(output + d, fma(load8(output + d), all8(before), load8(chunk_output + d) * now));
  *sum = __builtin_fmaf(*sum, before, chunk_sum * now);
  *maximum = m;
}

INLINE void finish(const float* output, float sum, float* to, int head_dim) {
  const float scale = 1.0f / sum;
  for (int d = 0; d < head_dim; d += 8) store8(to + d, load8(output + d) * scale);
}

// ---- a few queries over one chunk, read from the slab as it lies there

// Scores of R queries with four keys, whose rows lie `key_bytes` apart.
template <int R, bool IS_FLOAT16>
INLINE void score_four(const float* queries, const char* keys, const int64_t* offsets, int head_dim,
                       float* scores) {
  f8 acc[R][4] = {};
  for (int d = 0; d < head_dim; d += 8)
    UNROLL for (int j = 0; j < 4; j++) {
      f8 key = load_kv<IS_FLOAT16>(keys + offsets[j], d);
      UNROLL for (int r = 0; r < R; r++)
        acc[r][j] = fma(load8(queries + r * head_dim + d), key, acc[r][j]);
    }
  f8 none = {};
  for (int r = 0; r < R; r += 2) {
    f8 second[4] = {none, none, none, none};
    if (r + 1 < R)
      UNROLL for (int j = 0; j < 4; j++) second[j] = acc[r + 1 < R ? r + 1 : r][j];
    f8 sums = sums8(acc[r][0], acc[r][1], acc[r][2], acc[r][3], second[0], second[1], second[2],
                    second[3]);
    memcpy(scores + r * CHUNK, &sums, 16);
    if (r + 1 < R) memcpy(scores + (r + 1) * CHUNK, (const char*)&sums + 16, 16);
  }
}

// Add the values of `num_keys` keys, weighted, for NV vectors of 8 positions from `d` on.
template <int R, int NV, bool IS_FLOAT16>
INLINE void add_values(const float* weights, const char* values, int num_keys, int head_dim, int d,
                       float* output) {
  f8 acc[R][NV] = {};
  const int64_t key_bytes = (int64_t)head_dim * (IS_FLOAT16 ? 2 : 4);
  for (int j = 0; j < num_keys; j++, values += key_bytes) {
    f8 value[NV];
    UNROLL for (int v = 0; v < NV; v++) value[v] = load_kv<IS_FLOAT16>(values, d + v * 8);
    UNROLL for (int r = 0; r < R; r++) {
      f8 weight = all8(weights[r * CHUNK + j]);
      UNROLL for (int v = 0; v < NV; v++) acc[r][v] = fma(weight, value[v], acc[r][v]);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < NV; v++) store8(output + r * head_dim + d + v * 8, acc[r][v]);
}

template <int R, bool IS_FLOAT16>
static void attend_few(const float* queries, const char* keys, const char* values, int num_keys,
                       int head_dim, float* scores, float* maximum, float* sum, float* output) {
  const int64_t key_bytes = (int64_t)head_dim * (IS_FLOAT16 ? 2 : 4);
  for (int j = 0; j < num_keys; j += 4) {
    int64_t offsets[4];
    for (int i = 0; i < 4; i++) offsets[i] = (j + i < num_keys ? j + i : num_keys - 1) * key_bytes;
    // The hardware fetches ahead within a page only, and values are needed soon.
    for (int64_t i = 0; i < 4 * key_bytes; i += 64) {
      __builtin_prefetch(keys + j * key_bytes + 8 * key_bytes + i);
      __builtin_prefetch(values + j * key_bytes + i);
    }
    score_four<R, IS_FLOAT16>(queries, keys, offsets, head_dim, scores + j);
  }
  for (int r = 0; r < R; r++) weigh(scores + r * CHUNK, num_keys, maximum + r, sum + r);
  int d = 0;
  for (; d + 32 <= head_dim; d += 32)
    add_values<R, 4, IS_FLOAT16>(scores, values, num_keys, head_dim, d, output);
  for (; d < head_dim; d += 16)
    add_values<R, 2, IS_FLOAT16>(scores, values, num_keys, head_dim, d, output);
}

template <bool IS_FLOAT16>
static void attend_some(int num_queries, const float* queries, const char* keys, const char* values,
                        int num_keys, int head_dim, float* scores, float* maximum, float* sum,
                        float* output) {
  for (int r = 0; r < num_queries;) {
    const int left = num_queries - r, n = left < 3 ? left : 3;
    auto attend = n == 3   ? attend_few<3, IS_FLOAT16>
                  : n == 2 ? attend_few<2, IS_FLOAT16>
                           : attend_few<1, IS_FLOAT16>;
    attend(queries + r * head_dim, keys, values, num_keys, head_dim, scores, maximum + r, sum + r,
           output + r * head_dim);
    r += n;
  }
}

// ---- many queries over one chunk, whose keys and values are converted once

template <bool IS_FLOAT16>
static void unpack_chunk(AttentionScratch* scratch, const char* keys, const char* values,
                         int num_keys, int head_dim) {
  const int64_t key_bytes = (int64_t)head_dim * (IS_FLOAT16 ? 2 : 4);
  const int padded = (num_keys + 3) / 4 * 4;
  for (int j = 0; j < padded; j++)
    for (int d = 0; d < head_dim; d += 8)
      store8(scratch->keys + j * head_dim + d,
             j < num_keys ? load_kv<IS_FLOAT16>(keys + j * key_bytes, d) : f8{});
  // Panels of 16 positions: (head_dim / 16, keys, 16).
  for (int j = 0; j < num_keys; j++)
    for (int d = 0; d < head_dim; d += 8)
      store8(scratch->values + ((int64_t)d / 16 * num_keys + j) * 16 + d % 16,
             load_kv<IS_FLOAT16>(values + j * key_bytes, d));
}

template <int R>
INLINE void add_value_panel(const float* weights, const float* panel, int num_keys, float* output,
                            int head_dim) {
  constexpr int NV = 16 / VL;
  vf acc[R][NV] = {};
  for (int j = 0; j < num_keys; j++) {
    vf value[NV];
    UNROLL for (int v = 0; v < NV; v++) value[v] = load(panel + j * 16 + v * VL);
    UNROLL for (int r = 0; r < R; r++) {
      vf weight = all(weights[r * CHUNK + j]);
      UNROLL for (int v = 0; v < NV; v++) acc[r][v] = fma(weight, value[v], acc[r][v]);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < NV; v++) store(output + r * head_dim + v * VL, acc[r][v]);
}

// `num_seen(row)`: how many of the chunk's keys the row may see; rows that see none are left as
// they are.
template <class Seen>
static void attend_many(AttentionScratch* s, int num_rows, int num_keys, int head_dim,
                        Seen num_seen) {
  const int64_t offsets[4] = {0, head_dim * 4, head_dim * 8, head_dim * 12};
  for (int j = 0; j < num_keys; j += 4)
    for (int r = 0; r < num_rows; r += 2)  // the row behind the last is scratch
      score_four<2, false>(s->queries + r * head_dim, (const char*)(s->keys + j * head_dim), offsets,
                           head_dim, s->scores + r * CHUNK + j);
  float maximum[QUERY_ROWS], sum[QUERY_ROWS];
  for (int r = 0; r < num_rows; r++) {
    const int seen = num_seen(r);
    if (seen > 0) weigh(s->scores + r * CHUNK, seen, maximum + r, sum + r);
    // What lies behind is 0: a fused product with it leaves a sum as it is, bit for bit.
    for (int j = seen > 0 ? (seen + 7) / 8 * 8 : 0; j < num_keys; j++) s->scores[r * CHUNK + j] = 0;
  }
  for (int d = 0; d < head_dim; d += 16) {
    const float* panel = s->values + (int64_t)d * num_keys;
    int r = 0;
    for (; r + 6 <= num_rows; r += 6)
      add_value_panel<6>(s->scores + r * CHUNK, panel, num_keys, s->chunk_output + r * head_dim + d,
                         head_dim);
    for (; r < num_rows; r++)
      add_value_panel<1>(s->scores + r * CHUNK, panel, num_keys, s->chunk_output + r * head_dim + d,
                         head_dim);
  }
  for (int r = 0; r < num_rows; r++)
    if (num_seen(r) > 0)
      merge(s->maximum + r, s->sum + r, s->output + r * head_dim, maximum[r], sum[r],
            s->chunk_output + r * head_dim, head_dim);
}
