// Products of all rows with a weight, as a phase of tasks over its blocks of outputs.
#pragma once
#include "attention.h"

#define FEW_ACTIVATIONS 16  // work on the rows themselves is not worth a phase for so few

// Floats that grow with the largest step and stay.
struct Buffer {
  float* data = nullptr;
  int64_t capacity = 0;
  bool reserve(int64_t num_floats) {
    if (num_floats <= capacity) return true;
    free(data);
    data = (float*)aligned_alloc(64, (num_floats * 4 + 63) / 64 * 64);
    capacity = data ? num_floats : 0;
    return data != nullptr;
  }
  ~Buffer() { free(data); }
};

struct ThreadScratch {
  Panel panel;
  AttentionScratch attention;
};

// The threads, and the memory of the step that they are at.
struct KwThreads {
  Threads threads;
  pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER;
  ThreadScratch* scratch[MAX_THREADS] = {};
  Buffer x, normed, scaled4, scaled8, tiled, sums, qkv, queries, attended, hidden, outputs, parts, last_x;
  Buffer tokens, tasks;

  bool reserve_scratch() {
    for (int i = 0; i < threads.num_threads; i++) {
      if (!scratch[i])
        scratch[i] = (ThreadScratch*)aligned_alloc(64, (sizeof(ThreadScratch) + 63) / 64 * 64);
      if (!scratch[i]) return false;
    }
    return true;
  }
};

class Multiply {
 public:
  struct Target {
    const KwWeight* weight;
    int offset;  // of its outputs in a row of y
  };

  explicit Multiply(KwThreads* pool) : pool_(pool) {}

  bool reserve(int num_rows, int64_t widest_input) {
    const int64_t n = padded_rows(num_rows) * widest_input;
    return pool_->reserve_scratch() && pool_->scaled4.reserve(n) && pool_->scaled8.reserve(n) &&
           pool_->tiled.reserve(n) && pool_->sums.reserve(n / SUB);
  }

  // f(row), in a phase where that is worth it.
  template <class F>
  void each_row(int num_rows, F f) {
    if (num_rows <= FEW_ACTIVATIONS) {
      for (int row = 0; row < num_rows; row++) f(row);
      return;
    }
    pool_->threads.each((num_rows + 15) / 16, [&](int task, int) {
      for (int row = task * 16; row < num_rows && row < task * 16 + 16; row++) f(row);
    });
  }

  // f(block, thread) for all blocks, in tasks that are neither too small nor too few.
  template <class F>
  void each_block(int num_blocks, int num_rows, F f) {
    int step = num_rows > FEW_ACTIVATIONS ? 1 : num_blocks / (pool_->threads.num_threads * 8);
    step = step < 1 ? 1 : step > 8 ? 8 : step;
    pool_->threads.each((num_blocks + step - 1) / step, [&](int task, int thread) {
      for (int b = task * step; b < num_blocks && b < task * step + step; b++) f(b, thread);
    });
  }

  // The rows as this kind of weight takes them: to be used up before the next call for its kind.
  Rows rows_for(const KwWeight& weight, const float* x, int num_rows) {
    if (weight.kind == KW_AFFINE4) return scaled_rows<4>(&pool_->scaled4, x, num_rows, weight);
    if (weight.kind == KW_AFFINE8) return scaled_rows<8>(&pool_->scaled8, x, num_rows, weight);
    if (is_tiled(num_rows)) return scaled_rows<0>(&pool_->tiled, x, num_rows, weight);
    return {x, nullptr, num_rows, weight.num_inputs};
  }

  // y (rows, 32) of one block, with the weight's bias.
  void block(const KwWeight& weight, int block, const Rows& rows, float* y, int y_stride,
             int thread) {
    product(weight, block, rows, y, y_stride, &pool_->scratch[thread]->panel);
    if (!weight.bias) return;
    const float* bias = weight.bias + block * BLOCK;
    for (int row = 0; row < rows.num_rows; row++)
      for (int i = 0; i < BLOCK; i += 8) {
        float* to = y + (int64_t)row * y_stride + i;
        store8(to, load8(to) + load8(bias + i));
      }
  }

  // Products of the same x with up to three weights, side by side in y, as one phase.
  void side_by_side(const Target* targets, int num_targets, const float* x, int num_rows, float* y,
                    int y_stride) {
    Rows rows[3];
    int first_block[4] = {};
    for (int i = 0; i < num_targets; i++) {
      const bool is_as_before = i && targets[i].weight->kind == targets[i - 1].weight->kind;
      rows[i] = is_as_before ? rows[i - 1] : rows_for(*targets[i].weight, x, num_rows);
      first_block[i + 1] = first_block[i] + num_blocks(*targets[i].weight);
    }
    each_block(first_block[num_targets], num_rows, [&](int b, int thread) {
      int i = 0;
      while (b >= first_block[i + 1]) i++;
      const int own = b - first_block[i];
      block(*targets[i].weight, own, rows[i], y + targets[i].offset + own * BLOCK, y_stride,
            thread);
    });
  }

 private:
  template <int BITS>
  Rows scaled_rows(Buffer* buffer, const float* x, int num_rows, const KwWeight& weight) {
    const int num_inputs = weight.num_inputs;
    float *to = buffer->data, *sums = pool_->sums.data;
    if constexpr (BITS != 0)
      if (!is_tiled(num_rows))
        for (int64_t row = 0; row < num_rows; row++)
          scale_row<BITS>(x + row * num_inputs, num_inputs, to + row * num_inputs,
                          sums + row * (num_inputs / SUB));
    if (is_tiled(num_rows))
      pool_->threads.each(num_tiles(num_rows), [&](int tile, int) {
        const int64_t row = (int64_t)tile * TILE_ROWS;
        scale_tile<BITS>(x + row * num_inputs, num_rows - (int)row, num_inputs,
                         to + row * num_inputs, sums + row * (num_inputs / SUB));
      });
    return {to, sums, num_rows, num_inputs};
  }

  KwThreads* pool_;
};
