// What the library offers. It knows neither MLX nor Python: weights, slabs and token ids are
// pointers. All functions may be called from any thread; steps on one `KwThreads` take turns.
#pragma once
#include <stdint.h>

#define KW_ABI 2  // raised with every change of this file

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// How the numbers of a weight are kept. Affine: a group's value is code * scale + bias.
enum KwKind { KW_AFFINE4 = 0, KW_AFFINE8 = 1, KW_FLOAT32 = 2, KW_FLOAT16 = 3, KW_BFLOAT16 = 4 };
enum KwScale { KW_SCALE_FLOAT16 = 0, KW_SCALE_BFLOAT16 = 1 };
enum KwResult { KW_OK = 0, KW_NO_MEMORY = -1, KW_BAD_ARGUMENT = -2 };

// A matrix of `num_outputs` x `num_inputs`, packed by `kw_pack`. Outputs and inputs are multiples
// of 32; a group of an affine weight has 32 or 64 inputs. `bias` is NULL or has a float for each
// output, which is added to the product.
typedef struct {
  int32_t kind, group, scale, num_outputs, num_inputs;
  const uint8_t* data;
  const float* bias;
} KwWeight;

// `q_norm` and `k_norm` are NULL, or weights of an RMS norm over each head.
typedef struct {
  KwWeight q, k, v, o, gate, up, down;
  const float *attention_norm, *mlp_norm, *q_norm, *k_norm;
} KwLayer;

// `cosines` and `sines` are (num_positions, head_dim / 2): rotation of a head's halves.
// `attention_scale` multiplies queries. KV is float16 or float32.
typedef struct {
  int32_t num_layers, dim, mlp_dim, vocabulary, num_heads, num_kv_heads, head_dim;
  int32_t is_kv_float16, num_positions;
  float norm_epsilon, attention_scale;
  const KwLayer* layers;
  KwWeight embedding, head;
  const float *final_norm, *cosines, *sines;
} KwModel;

// One sequence in a step: `num_tokens` ids that follow the `start` tokens in its slab. `kv` has the
// keys and the values of layer 0, then of layer 1, ...: each (num_kv_heads, capacity, head_dim).
// Logits are computed for the last `num_logits` of the tokens.
typedef struct {
  const int32_t* ids;
  void* const* kv;
  int64_t capacity;
  int32_t num_tokens, start, num_logits;
} KwRow;

typedef struct KwThreads KwThreads;

int32_t kw_abi(void);
// "x86-64-v4", "x86-64-v3" or "aarch64": what the library was compiled for.
const char* kw_target(void);
// A digest of the sources, given by `build.py`: which bits the library computes depends on them.
const char* kw_sources(void);

// NULL without memory. `num_threads` counts the caller.
KwThreads* kw_threads_new(int32_t num_threads);
int32_t kw_threads_count(const KwThreads* threads);
void kw_threads_free(KwThreads* threads);

// Bytes that the packed weight takes.
int64_t kw_packed_bytes(int32_t kind, int32_t group, int32_t num_outputs, int32_t num_inputs);
// Pack rows as MLX keeps them: `words` (num_outputs, num_inputs * bits / 32) with `scales` and
// `biases` (num_outputs, num_inputs / group), or plain numbers with neither.
int32_t kw_pack(int32_t kind, int32_t group, int32_t num_outputs, int32_t num_inputs,
                const void* words, const uint16_t* scales, const uint16_t* biases, uint8_t* packed);

// y (rows, num_outputs) = x (rows, num_inputs) times the weight, for tests and benchmarks.
int32_t kw_product(KwThreads* threads, const KwWeight* weight, const float* x, float* y,
                   int32_t num_rows);

// Compute the tokens of all rows, append their KV to the slabs, and write the logits, row by row,
// each (vocabulary). The slabs' `start` is the caller's to advance.
int32_t kw_step(KwThreads* threads, const KwModel* model, const KwRow* rows, int32_t num_rows,
                float* logits);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
