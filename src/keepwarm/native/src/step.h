// A step: all layers of a model over the tokens of all rows, one phase of tasks after another.
#pragma once
#include "multiply.h"

#define FEW_TOKENS 4      // rows with up to so many tokens attend a chunk of keys at a time
// A token's place: its row, its position there.
struct Token {
  int row, position;
};

// What a thread attends at a time. Prefill: `num_tokens` tokens from `first_token` on over all
// their keys. Decode: one token over one chunk of keys, into a part.
struct AttentionTask {
  int kv_head, first_token, num_tokens, chunk;
  int64_t part;
};

class Step {
 public:
  Step(KwThreads* pool, const KwModel& model, const KwRow* rows, int num_rows)
      : pool_(pool), multiply_(pool), model_(model), rows_(rows), num_rows_(num_rows) {
    shape_ = {model.num_heads, model.num_kv_heads, model.head_dim, model.is_kv_float16 != 0};
    queries_dim_ = model.num_heads * model.head_dim;
    kv_dim_ = model.num_kv_heads * model.head_dim;
    qkv_dim_ = queries_dim_ + 2 * kv_dim_;
    for (int r = 0; r < num_rows; r++) {
      num_tokens_ += rows[r].num_tokens;
      num_logits_ += rows[r].num_logits;
    }
  }

  int run(float* logits) {
    if (!reserve()) return KW_NO_MEMORY;
    list_tokens();
    list_attention_tasks();
    embed();
    for (int layer = 0; layer < model_.num_layers; layer++) {
      attention(layer);
      mlp(model_.layers[layer]);
    }
    if (num_logits_) head(logits);
    return KW_OK;
  }

 private:
  // ---- before the layers

  bool reserve() {
    const int64_t n = num_tokens_;
    int64_t num_tasks = 0, num_parts = 0;
    count_tasks(&num_tasks, &num_parts);
    const bool is_enough =
        multiply_.reserve(n, widest_input()) && pool_->x.reserve(n * model_.dim) &&
        pool_->normed.reserve(n * model_.dim) && pool_->qkv.reserve(n * qkv_dim_) &&
        pool_->queries.reserve(n * queries_dim_) && pool_->attended.reserve(n * queries_dim_) &&
        pool_->hidden.reserve(n * model_.mlp_dim) &&
        pool_->outputs.reserve(pool_->threads.num_threads * n * 2 * BLOCK) &&
        pool_->last_x.reserve((int64_t)num_logits_ * model_.dim) &&
        pool_->parts.reserve(num_parts * part_floats()) &&
        pool_->tokens.reserve(n * (int64_t)sizeof(Token) / 4) &&
        pool_->tasks.reserve(num_tasks * (int64_t)sizeof(AttentionTask) / 4);
    tokens_ = (Token*)pool_->tokens.data;
    tasks_ = (AttentionTask*)pool_->tasks.data;
    return is_enough;
  }

  int widest_input() const {
    int widest = model_.dim > model_.mlp_dim ? model_.dim : model_.mlp_dim;
    return widest > queries_dim_ ? widest : queries_dim_;
  }
  int64_t part_floats() const {
    return (int64_t)shape_.queries_per_head() * (model_.head_dim + 2);
  }

  void list_tokens() {
    int token = 0;
    for (int r = 0; r < num_rows_; r++)
      for (int i = 0; i < rows_[r].num_tokens; i++) tokens_[token++] = {r, rows_[r].start + i};
  }

  static int num_chunks(int position) { return position / CHUNK + 1; }
  int tokens_in_task() const {
    int tokens = QUERY_ROWS / shape_.queries_per_head();
    return tokens < 32 ? tokens : 32;
  }

  void count_tasks(int64_t* num_tasks, int64_t* num_parts) const {
    for (int r = 0; r < num_rows_; r++) {
      const KwRow& row = rows_[r];
      if (row.num_tokens > FEW_TOKENS) {
        *num_tasks += (row.num_tokens + tokens_in_task() - 1) / tokens_in_task();
        continue;
      }
      for (int i = 0; i < row.num_tokens; i++) *num_parts += num_chunks(row.start + i);
    }
    *num_parts *= model_.num_kv_heads;
    *num_tasks = *num_tasks * model_.num_kv_heads + *num_parts;
  }

  // The longest first, so that no thread begins one when the others have ended.
  void list_attention_tasks() {
    int first = 0;
    num_parts_ = 0;
    for (int r = 0; r < num_rows_; first += rows_[r].num_tokens, r++) {
      if (rows_[r].num_tokens <= FEW_TOKENS) continue;
      const int step = tokens_in_task();
      for (int t = (rows_[r].num_tokens - 1) / step * step; t >= 0; t -= step)
        for (int h = 0; h < model_.num_kv_heads; h++) {
          const int left = rows_[r].num_tokens - t;
          tasks_[num_tasks_++] = {h, first + t, left < step ? left : step, 0, -1};
        }
    }
    for (int token = 0; token < num_tokens_; token++) {
      if (rows_[tokens_[token].row].num_tokens > FEW_TOKENS) continue;
      for (int c = 0; c < num_chunks(tokens_[token].position); c++)
        for (int h = 0; h < model_.num_kv_heads; h++)
          tasks_[num_tasks_++] = {h, token, 1, c, num_parts_++};
    }
  }

  void embed() {
    int token = 0;
    for (int r = 0; r < num_rows_; r++)
      for (int i = 0; i < rows_[r].num_tokens; i++, token++)
        unpack_row(model_.embedding, rows_[r].ids[i], pool_->x.data + (int64_t)token * model_.dim);
  }

  // ---- a layer

  void attention(int layer) {
    const KwLayer& l = model_.layers[layer];
    norm(l.attention_norm);
    const Multiply::Target targets[] = {
        {&l.q, 0}, {&l.k, queries_dim_}, {&l.v, queries_dim_ + kv_dim_}};
    multiply_.side_by_side(targets, 3, pool_->normed.data, num_tokens_, pool_->qkv.data, qkv_dim_);
    multiply_.each_row(num_tokens_, [&](int token) { rotate_and_append(l, layer, token); });
    pool_->threads.each(num_tasks_, [&](int task, int thread) {
      const AttentionTask& t = tasks_[task];
      AttentionScratch* scratch = &pool_->scratch[thread]->attention;
      t.part < 0 ? attend_tokens(layer, t, scratch) : attend_chunk(layer, t, scratch);
    });
    merge_parts();
    add_product(l.o, pool_->attended.data);
  }

  void mlp(const KwLayer& l) {
    norm(l.mlp_norm);
    gate_and_up(l);
    add_product(l.down, pool_->hidden.data);
  }

  void norm_row(const float* x, const float* weight, float* to, int dim) {
    f8 squares = {};
    for (int i = 0; i < dim; i += 8) squares = fma(load8(x + i), load8(x + i), squares);
    const float mean = sum8(squares) / (float)dim;
    const float scale = 1.0f / __builtin_sqrtf(mean + model_.norm_epsilon);
    for (int i = 0; i < dim; i += 8) store8(to + i, load8(x + i) * scale * load8(weight + i));
  }

  void norm(const float* weight) {
    const int dim = model_.dim;
    multiply_.each_row(num_tokens_, [&](int row) {
      const int64_t at = (int64_t)row * dim;
      norm_row(pool_->x.data + at, weight, pool_->normed.data + at, dim);
    });
  }

  // x += the product: the residual connection.
  void add_product(const KwWeight& weight, const float* from) {
    const Rows rows = multiply_.rows_for(weight, from, num_tokens_);
    multiply_.each_block(num_blocks(weight), num_tokens_, [&](int b, int thread) {
      float* output = outputs_of(thread);
      multiply_.block(weight, b, rows, output, BLOCK, thread);
      for (int row = 0; row < num_tokens_; row++)
        for (int i = 0; i < BLOCK; i += 8) {
          float* to = pool_->x.data + (int64_t)row * model_.dim + b * BLOCK + i;
          store8(to, load8(to) + load8(output + row * BLOCK + i));
        }
    });
  }

  // hidden = silu(gate) * up
  void gate_and_up(const KwLayer& l) {
    const Rows gate_rows = multiply_.rows_for(l.gate, pool_->normed.data, num_tokens_);
    const Rows up_rows = l.up.kind == l.gate.kind
                             ? gate_rows
                             : multiply_.rows_for(l.up, pool_->normed.data, num_tokens_);
    multiply_.each_block(num_blocks(l.gate), num_tokens_, [&](int b, int thread) {
      float *gate = outputs_of(thread), *up = gate + (int64_t)num_tokens_ * BLOCK;
      multiply_.block(l.gate, b, gate_rows, gate, BLOCK, thread);
      multiply_.block(l.up, b, up_rows, up, BLOCK, thread);
      for (int row = 0; row < num_tokens_; row++)
        for (int i = 0; i < BLOCK; i += 8)
          store8(pool_->hidden.data + (int64_t)row * model_.mlp_dim + b * BLOCK + i,
                 silu(load8(gate + row * BLOCK + i)) * load8(up + row * BLOCK + i));
    });
  }

  INLINE_MEMBER static f8 silu(f8 g) {
    f8 e = exp8(g < f8{} ? g : -g);
    return g * ((g < f8{} ? e : all8(1.0f)) / (e + 1.0f));
  }

  float* outputs_of(int thread) const {
    return pool_->outputs.data + (int64_t)thread * num_tokens_ * 2 * BLOCK;
  }

  // ---- attention

  // Rotate the token's queries and keys, scale the queries, and put keys and values in the slab.
  void rotate_and_append(const KwLayer& l, int layer, int token) {
    const int dim = model_.head_dim, half = dim / 2;
    const Token& t = tokens_[token];
    const KwRow& row = rows_[t.row];
    float* from = pool_->qkv.data + (int64_t)token * qkv_dim_;
    const float* cosines = model_.cosines + (int64_t)t.position * half;
    const float* sines = model_.sines + (int64_t)t.position * half;
    for (int head = 0; head < model_.num_heads + model_.num_kv_heads; head++, from += dim) {
      const bool is_query = head < model_.num_heads;
      const float* weight = is_query ? l.q_norm : l.k_norm;
      if (weight) norm_row(from, weight, from, dim);
      alignas(32) float rotated[MAX_HEAD_DIM];
      for (int i = 0; i < half; i += 8) {
        f8 a = load8(from + i), b = load8(from + half + i);
        f8 c = load8(cosines + i), s = load8(sines + i);
        store8(rotated + i, fma(a, c, -(b * s)));
        store8(rotated + half + i, fma(a, s, b * c));
      }
      if (is_query) {
        float* to = pool_->queries.data + (int64_t)token * queries_dim_ + head * dim;
        for (int i = 0; i < dim; i += 8) store8(to + i, load8(rotated + i) * model_.attention_scale);
      } else {
        write_kv(row, 2 * layer, head - model_.num_heads, t.position, rotated);
      }
    }
    for (int head = 0; head < model_.num_kv_heads; head++, from += dim)
      write_kv(row, 2 * layer + 1, head, t.position, from);
  }

  void write_kv(const KwRow& row, int tensor, int head, int position, const float* numbers) {
    const int64_t at = (head * row.capacity + position) * model_.head_dim;
    if (!shape_.is_float16) {
      memcpy((float*)row.kv[tensor] + at, numbers, model_.head_dim * sizeof(float));
      return;
    }
    for (int i = 0; i < model_.head_dim; i += 8)
      to_f16((uint16_t*)row.kv[tensor] + at + i, load8(numbers + i));
  }

  const char* kv_of(int row, int tensor, int head, int position) const {
    const int64_t at = (head * rows_[row].capacity + position) * model_.head_dim;
    return (const char*)rows_[row].kv[tensor] + at * shape_.number_bytes();
  }

  void attend_chunk(int layer, const AttentionTask& task, AttentionScratch* scratch) {
    const Token& token = tokens_[task.first_token];
    const int n = shape_.queries_per_head(), first = task.chunk * CHUNK;
    const int left = token.position + 1 - first;
    float* part = pool_->parts.data + task.part * part_floats();
    auto attend = shape_.is_float16 ? attend_some<true> : attend_some<false>;
    attend(n, queries_of(task.first_token, task.kv_head),
           kv_of(token.row, 2 * layer, task.kv_head, first),
           kv_of(token.row, 2 * layer + 1, task.kv_head, first), left < CHUNK ? left : CHUNK,
           model_.head_dim, scratch->scores, part, part + n, part + 2 * n);
  }

  const float* queries_of(int token, int kv_head) const {
    return pool_->queries.data + (int64_t)token * queries_dim_ +
           kv_head * shape_.queries_per_head() * model_.head_dim;
  }
  float* attended_of(int token, int kv_head) const {
    return pool_->attended.data + (int64_t)token * queries_dim_ +
           kv_head * shape_.queries_per_head() * model_.head_dim;
  }

  void attend_tokens(int layer, const AttentionTask& task, AttentionScratch* s) {
    const int dim = model_.head_dim, per_head = shape_.queries_per_head();
    const Token& first = tokens_[task.first_token];
    const int num_rows = task.num_tokens * per_head;
    for (int t = 0; t < task.num_tokens; t++)
      memcpy(s->queries + t * per_head * dim, queries_of(task.first_token + t, task.kv_head),
             per_head * dim * sizeof(float));
    memset(s->queries + num_rows * dim, 0, 2 * dim * sizeof(float));
    memset(s->output, 0, num_rows * dim * sizeof(float));
    for (int r = 0; r < num_rows; r++) s->maximum[r] = -__builtin_inff(), s->sum[r] = 0;
    const int num_keys = first.position + task.num_tokens;
    auto unpack = shape_.is_float16 ? unpack_chunk<true> : unpack_chunk<false>;
    for (int key = 0; key < num_keys; key += CHUNK) {
      const int n = num_keys - key < CHUNK ? num_keys - key : CHUNK;
      unpack(s, kv_of(first.row, 2 * layer, task.kv_head, key),
             kv_of(first.row, 2 * layer + 1, task.kv_head, key), n, dim);
      attend_many(s, num_rows, n, dim, [&](int r) {
        const int seen = first.position + r / per_head + 1 - key;
        return seen < n ? seen : n;
      });
    }
    for (int t = 0; t < task.num_tokens; t++)
      for (int i = 0; i < per_head; i++) {
        const int r = t * per_head + i;
        finish(s->output + r * dim, s->sum[r],
               attended_of(task.first_token + t, task.kv_head) + i * dim, dim);
      }
  }

  void merge_parts() {
    const int dim = model_.head_dim, n = shape_.queries_per_head();
    int64_t part = 0;
    for (int token = 0; token < num_tokens_; token++) {
      if (rows_[tokens_[token].row].num_tokens > FEW_TOKENS) continue;
      const int chunks = num_chunks(tokens_[token].position);
      for (int h = 0; h < model_.num_kv_heads; h++)
        for (int i = 0; i < n; i++) {
          float output[MAX_HEAD_DIM] = {}, maximum = -__builtin_inff(), sum = 0;
          for (int c = 0; c < chunks; c++) {
            const float* p =
                pool_->parts.data + (part + (int64_t)c * model_.num_kv_heads + h) * part_floats();
            merge(&maximum, &sum, output, p[i], p[n + i], p + 2 * n + i * dim, dim);
          }
          finish(output, sum, attended_of(token, h) + i * dim, dim);
        }
      part += (int64_t)chunks * model_.num_kv_heads;
    }
  }

  // ---- behind the layers

  void head(float* logits) {
    float* x = pool_->last_x.data;
    int token = 0, row = 0;
    for (int r = 0; r < num_rows_; r++) {
      token += rows_[r].num_tokens;
      for (int i = token - rows_[r].num_logits; i < token; i++, row++)
        norm_row(pool_->x.data + (int64_t)i * model_.dim, model_.final_norm,
                 x + (int64_t)row * model_.dim, model_.dim);
    }
    const Multiply::Target target = {&model_.head, 0};
    multiply_.side_by_side(&target, 1, x, num_logits_, logits, model_.vocabulary);
  }

  KwThreads* pool_;
  Multiply multiply_;
  const KwModel& model_;
  const KwRow* rows_;
  int num_rows_, num_tokens_ = 0, num_logits_ = 0;
  int queries_dim_, kv_dim_, qkv_dim_;
  AttentionShape shape_;
  Token* tokens_ = nullptr;
  AttentionTask* tasks_ = nullptr;
  int num_tasks_ = 0;
  int64_t num_parts_ = 0;
};
