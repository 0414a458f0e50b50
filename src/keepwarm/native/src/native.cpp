// The library in one translation unit, compiled once for each instruction set.
#include "step.h"

#ifndef KW_SOURCES
#define KW_SOURCES ""  // compiled by hand
#endif

// The standard library's <new> would bring its headers along.
inline void* operator new(__SIZE_TYPE__, void* place) noexcept { return place; }

int32_t kw_abi(void) { return KW_ABI; }

const char* kw_sources(void) { return KW_SOURCES; }

const char* kw_target(void) {
#if VL == 16
  return "x86-64-v4";
#elif VL == 8
  return "x86-64-v3";
#else
  return "aarch64";
#endif
}

KwThreads* kw_threads_new(int32_t num_threads) {
  void* memory = aligned_alloc(64, (sizeof(KwThreads) + 63) / 64 * 64);
  if (!memory) return nullptr;
  KwThreads* pool = new (memory) KwThreads();
  pool->threads.start(num_threads);
  return pool;
}

int32_t kw_threads_count(const KwThreads* pool) { return pool->threads.num_threads; }

void kw_threads_free(KwThreads* pool) {
  pool->threads.stop();
  for (ThreadScratch* scratch : pool->scratch) free(scratch);
  pool->~KwThreads();
  free(pool);
}

int64_t kw_packed_bytes(int32_t kind, int32_t group, int32_t num_outputs, int32_t num_inputs) {
  if (!is_packable(kind, group, num_outputs, num_inputs)) return KW_BAD_ARGUMENT;
  return num_outputs / BLOCK * block_bytes(kind, group, num_inputs);
}

int32_t kw_pack(int32_t kind, int32_t group, int32_t num_outputs, int32_t num_inputs,
                const void* words, const uint16_t* scales, const uint16_t* biases,
                uint8_t* packed) {
  if (!is_packable(kind, group, num_outputs, num_inputs)) return KW_BAD_ARGUMENT;
  if (is_affine(kind))
    pack_affine(bits_of(kind), group, num_outputs, num_inputs, (const uint32_t*)words, scales,
                biases, packed);
  else if (kind == KW_FLOAT32)
    pack_plain(num_outputs, num_inputs, (const uint32_t*)words, (uint32_t*)packed);
  else
    pack_plain(num_outputs, num_inputs, (const uint16_t*)words, (uint16_t*)packed);
  return KW_OK;
}

namespace {
struct Lock {
  explicit Lock(pthread_mutex_t* mutex) : mutex_(mutex) { pthread_mutex_lock(mutex); }
  ~Lock() { pthread_mutex_unlock(mutex_); }
  pthread_mutex_t* mutex_;
};
}  // namespace

int32_t kw_product(KwThreads* pool, const KwWeight* weight, const float* x, float* y,
                   int32_t num_rows) {
  if (!is_packable(weight->kind, weight->group, weight->num_outputs, weight->num_inputs))
    return KW_BAD_ARGUMENT;
  Lock lock(&pool->in_use);
  Multiply multiply(pool);
  if (!multiply.reserve(num_rows, weight->num_inputs)) return KW_NO_MEMORY;
  const Multiply::Target target = {weight, 0};
  multiply.side_by_side(&target, 1, x, num_rows, y, weight->num_outputs);
  return KW_OK;
}

static bool is_shape(const KwWeight& w, int num_outputs, int num_inputs) {
  return w.data && is_packable(w.kind, w.group, w.num_outputs, w.num_inputs) &&
         w.num_outputs == num_outputs && w.num_inputs == num_inputs;
}

static bool is_sound(const KwModel& m) {
  if (m.num_heads <= 0 || m.num_kv_heads <= 0 || m.num_heads % m.num_kv_heads) return false;
  if (m.num_heads > MAX_HEADS || m.num_heads / m.num_kv_heads > QUERY_ROWS) return false;
  if (m.head_dim <= 0 || m.head_dim % 16 || m.head_dim > MAX_HEAD_DIM) return false;
  if (!is_shape(m.embedding, m.vocabulary, m.dim) || !is_shape(m.head, m.vocabulary, m.dim))
    return false;
  if (!m.final_norm || !m.cosines || !m.sines || m.num_layers <= 0) return false;
  const int queries = m.num_heads * m.head_dim, kv = m.num_kv_heads * m.head_dim;
  for (int i = 0; i < m.num_layers; i++) {
    const KwLayer& l = m.layers[i];
    if (!is_shape(l.q, queries, m.dim) || !is_shape(l.k, kv, m.dim) || !is_shape(l.v, kv, m.dim) ||
        !is_shape(l.o, m.dim, queries) || !is_shape(l.gate, m.mlp_dim, m.dim) ||
        !is_shape(l.up, m.mlp_dim, m.dim) || !is_shape(l.down, m.dim, m.mlp_dim))
      return false;
    if (!l.attention_norm || !l.mlp_norm) return false;
  }
  return true;
}

// Whether the rows are within their slabs, the positions and the vocabulary, and a phase can hold
// their tasks.
static bool are_sound(const KwModel& m, const KwRow* rows, int num_rows) {
  int64_t num_tokens = 0, num_chunks = 0;
  for (int r = 0; r < num_rows; r++) {
    const KwRow& row = rows[r];
    const int64_t end = (int64_t)row.start + row.num_tokens;
    if (row.num_tokens <= 0 || row.start < 0 || end > row.capacity || end > m.num_positions)
      return false;
    if (row.num_logits < 0 || row.num_logits > row.num_tokens) return false;
    for (int i = 0; i < row.num_tokens; i++)
      if (row.ids[i] < 0 || row.ids[i] >= m.vocabulary) return false;
    num_tokens += row.num_tokens;
    num_chunks += FEW_TOKENS * (end / CHUNK + 1);
  }
  return num_rows > 0 && (num_tokens + num_chunks) * m.num_kv_heads <= MAX_TASKS;
}

int32_t kw_step(KwThreads* pool, const KwModel* model, const KwRow* rows, int32_t num_rows,
                float* logits) {
  if (!is_sound(*model) || !are_sound(*model, rows, num_rows)) return KW_BAD_ARGUMENT;
  Lock lock(&pool->in_use);
  return Step(pool, *model, rows, num_rows).run(logits);
}
