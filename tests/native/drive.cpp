// Random models, prompts and splits through the native step, for the sanitizers: the same tokens in
// one go, in random pieces, and beside other rows must give the same bits, and a step that cannot
// be is refused. Prints what differed, and a digest of all logits, the same for every compiler and
// instruction set.
//
// usage: drive SEED ROUNDS
#include "native.cpp"

#include <stdio.h>

#define MAX_BESIDE 20

static uint64_t state, digest = 14695981039346656037ull;
static uint32_t random_bits() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (uint32_t)(state >> 33);
}
static int between(int low, int high) { return low + (int)(random_bits() % (uint32_t)(high - low + 1)); }
static float random_float() { return (float)(int32_t)(random_bits() % 2001 - 1000) / 1000.0f; }

// Owns every allocation, so that what is left is a leak of the library's.
struct Memory {
  void* blocks[4096];
  int num = 0;
  template <class T>
  T* take(int64_t count) {
    void* p = aligned_alloc(64, (count * (int64_t)sizeof(T) + 63) / 64 * 64);
    return (T*)(blocks[num++] = p);
  }
  ~Memory() {
    for (int i = 0; i < num; i++) free(blocks[i]);
  }
};

static float* floats(Memory& memory, int64_t count, float scale) {
  float* p = memory.take<float>(count);
  for (int64_t i = 0; i < count; i++) p[i] = random_float() * scale;
  return p;
}

static KwWeight random_weight(Memory& memory, int num_outputs, int num_inputs) {
  KwWeight w = {};
  w.kind = between(KW_AFFINE4, KW_BFLOAT16);
  w.group = num_inputs % 64 == 0 && between(0, 1) ? 64 : 32;
  w.scale = between(KW_SCALE_FLOAT16, KW_SCALE_BFLOAT16);
  w.num_outputs = num_outputs;
  w.num_inputs = num_inputs;
  const int64_t count = (int64_t)num_outputs * num_inputs, num_groups = count / w.group;
  uint32_t* words = memory.take<uint32_t>(count);
  uint16_t *scales = memory.take<uint16_t>(num_groups), *biases = memory.take<uint16_t>(num_groups);
  for (int64_t i = 0; i < count; i++) {
    words[i] = random_bits();  // 31 bits; operands of one expression have no order
    words[i] ^= random_bits() << 16;
  }
  if (w.kind == KW_FLOAT32)
    for (int64_t i = 0; i < count; i++) ((float*)words)[i] = random_float() * 0.1f;
  if (w.kind == KW_FLOAT16 || w.kind == KW_BFLOAT16)  // 0.03 to 0.12, of both signs, in either
    for (int64_t i = 0; i < count; i++) {
      const int number = (w.kind == KW_FLOAT16 ? 0x2800 : 0x3d00) + between(0, 0xff);
      ((uint16_t*)words)[i] = (uint16_t)(number + between(0, 1) * 0x8000);
    }
  for (int64_t i = 0; i < num_groups; i++) {
    scales[i] = w.scale == KW_SCALE_FLOAT16 ? 0x1c00 : 0x3b80;  // 0.004
    biases[i] = w.scale == KW_SCALE_FLOAT16 ? 0xa800 : 0xbd00;  // -0.03
  }
  uint8_t* packed = memory.take<uint8_t>(kw_packed_bytes(w.kind, w.group, num_outputs, num_inputs));
  kw_pack(w.kind, w.group, num_outputs, num_inputs, words, scales, biases, packed);
  w.data = packed;
  w.bias = between(0, 1) ? floats(memory, num_outputs, 0.1f) : nullptr;
  return w;
}

static KwModel random_model(Memory& memory) {
  KwModel m = {};
  m.num_layers = between(1, 3);
  m.head_dim = between(0, 9) ? 16 * between(1, 5) : MAX_HEAD_DIM;
  m.num_kv_heads = between(1, 2);
  m.num_heads = m.num_kv_heads * between(1, 7);
  if (m.num_heads * m.head_dim % 32 || m.num_kv_heads * m.head_dim % 32)
    m.num_kv_heads *= 2, m.num_heads *= 2;
  m.dim = 32 * between(1, 4);
  m.mlp_dim = 32 * between(1, 5);
  m.vocabulary = 32 * between(1, 4);
  m.is_kv_float16 = between(0, 1);
  m.num_positions = 1024;
  m.norm_epsilon = 1e-5f;
  m.attention_scale = 0.2f;
  const int queries = m.num_heads * m.head_dim, kv = m.num_kv_heads * m.head_dim;
  KwLayer* layers = memory.take<KwLayer>(m.num_layers);
  for (int i = 0; i < m.num_layers; i++) {
    KwLayer& l = layers[i];
    l.q = random_weight(memory, queries, m.dim), l.k = random_weight(memory, kv, m.dim);
    l.v = random_weight(memory, kv, m.dim), l.o = random_weight(memory, m.dim, queries);
    l.gate = random_weight(memory, m.mlp_dim, m.dim), l.up = random_weight(memory, m.mlp_dim, m.dim);
    l.down = random_weight(memory, m.dim, m.mlp_dim);
    l.attention_norm = floats(memory, m.dim, 1), l.mlp_norm = floats(memory, m.dim, 1);
    l.q_norm = between(0, 1) ? floats(memory, m.head_dim, 1) : nullptr;
    l.k_norm = between(0, 1) ? floats(memory, m.head_dim, 1) : nullptr;
  }
  m.layers = layers;
  m.embedding = random_weight(memory, m.vocabulary, m.dim);
  m.head = random_weight(memory, m.vocabulary, m.dim);
  m.final_norm = floats(memory, m.dim, 1);
  m.cosines = floats(memory, m.num_positions * m.head_dim / 2, 1);
  m.sines = floats(memory, m.num_positions * m.head_dim / 2, 1);
  return m;
}

struct Sequence {
  void** kv;
  int64_t capacity;
  int num_tokens = 0;

  Sequence(Memory& memory, const KwModel& m, int length) {
    capacity = length;
    kv = memory.take<void*>(2 * m.num_layers);
    for (int i = 0; i < 2 * m.num_layers; i++)
      kv[i] = memory.take<uint8_t>((int64_t)m.num_kv_heads * capacity * m.head_dim * (m.is_kv_float16 ? 2 : 4));
  }
  KwRow row(const int32_t* ids, int num, int num_logits) {
    KwRow r = {ids + num_tokens, kv, capacity, num, num_tokens, num_logits};
    num_tokens += num;
    return r;
  }
};

static bool is_equal(const char* what, int seed, const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    if (memcmp(a + i, b + i, 4) == 0 && a[i] == a[i]) continue;
    printf("seed %d, %s: number %ld is %g and %g\n", seed, what, (long)i, (double)a[i], (double)b[i]);
    return false;
  }
  return true;
}

// Steps that no model can make, each wrong in one thing.
static bool are_refused(KwThreads* threads, const KwModel& m, const int32_t* ids, int length,
                        float* logits) {
  Memory memory;
  Sequence sequence(memory, m, length);
  bool is_well = true;
  for (int fault = 0; fault < 16; fault++) {
    KwModel model = m;
    KwLayer layer = m.layers[0];
    int32_t bad_id = fault == 0 ? -1 : m.vocabulary;
    KwRow row = {fault < 2 ? &bad_id : ids, sequence.kv, length, 1, 0, 1};
    model.layers = fault >= 12 ? &layer : m.layers;
    if (fault == 2) row.num_tokens = length + 1;
    if (fault == 3) row.num_tokens = 0;
    if (fault == 4) row.start = -1;
    if (fault == 5) row.num_logits = 2;
    if (fault == 6) row.start = 0x7fffffff;
    if (fault == 7) row.capacity = m.num_positions + 1, row.start = m.num_positions;
    if (fault == 8) model.num_heads = 0x7fffffff;
    if (fault == 9) model.head_dim = MAX_HEAD_DIM + 16;
    if (fault == 10) model.num_kv_heads = 0;
    if (fault == 11) model.num_layers = -1;
    if (fault == 12) layer.down.num_inputs += 32;
    if (fault == 13) layer.gate.kind = KW_BFLOAT16 + 1;
    if (fault == 14) layer.q.data = nullptr;
    if (fault == 15) layer.mlp_norm = nullptr;
    if (kw_step(threads, &model, &row, 1, logits) == KW_BAD_ARGUMENT) continue;
    printf("fault %d was computed\n", fault);
    is_well = false;
  }
  return is_well;
}

static bool try_one(int seed) {
  state = (uint64_t)seed * 0x9E3779B97F4A7C15ull + 1;
  Memory memory;
  KwModel m = random_model(memory);
  KwThreads* threads = kw_threads_new(between(1, 4));
  const int length = between(2, 700);
  int32_t* ids = memory.take<int32_t>(length);
  for (int i = 0; i < length; i++) ids[i] = between(0, m.vocabulary - 1);
  const int64_t count = (int64_t)length * m.vocabulary;
  float* whole = memory.take<float>(count);

  Sequence one(memory, m, length);
  KwRow row = one.row(ids, length, length);
  bool is_well = kw_step(threads, &m, &row, 1, whole) == KW_OK;

  for (int64_t i = 0; i < count * 4; i++)
    digest = (digest ^ ((const uint8_t*)whole)[i]) * 1099511628211ull;

  // In random pieces, each beside up to MAX_BESIDE rows that repeat the beginning.
  Sequence pieces(memory, m, length);
  Sequence* beside[MAX_BESIDE];
  for (int i = 0; i < MAX_BESIDE; i++) beside[i] = new (memory.take<Sequence>(1)) Sequence(memory, m, length);
  float* logits = memory.take<float>((int64_t)(length + MAX_BESIDE) * m.vocabulary);
  for (int at = 0; is_well && at < length;) {
    const int n = between(0, 2) ? between(1, length - at < 6 ? length - at : 6) : between(1, length - at);
    const int num_logits = between(0, 3) ? n : between(0, n);
    KwRow rows[1 + MAX_BESIDE] = {pieces.row(ids, n, num_logits)};
    const int wanted = between(0, 2) ? 0 : between(1, MAX_BESIDE);
    int num_rows = 1;
    for (int i = 0; i < wanted; i++)
      if (beside[i]->num_tokens < length) rows[num_rows++] = beside[i]->row(ids, 1, 1);
    is_well = kw_step(threads, &m, rows, num_rows, logits) == KW_OK;
    for (int r = 0, i = 0; is_well && r < num_rows; i += rows[r++].num_logits) {
      const int first = rows[r].start + rows[r].num_tokens - rows[r].num_logits;
      is_well = is_equal(r ? "beside" : "split", seed, whole + (int64_t)first * m.vocabulary,
                         logits + (int64_t)i * m.vocabulary, (int64_t)rows[r].num_logits * m.vocabulary);
    }
    at += n;
  }
  is_well &= are_refused(threads, m, ids, length, logits);
  kw_threads_free(threads);
  return is_well;
}

int main(int, char** arguments) {
  const int seed = atoi(arguments[1]), rounds = atoi(arguments[2]);
  int num_failed = 0;
  for (int i = 0; i < rounds; i++) num_failed += !try_one(seed + i);
  printf("digest %016llx\n%d of %d failed\n", (unsigned long long)digest, num_failed, rounds);
  return num_failed != 0;
}
