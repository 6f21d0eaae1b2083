// W x + b by one thread: some tiles of a weight and a block of rows; in floats or in integers.
//
// Each output of a row is summed over the inputs in one order, whatever rows stand beside it.
#pragma once

#include <cstdint>

#include "weight.h"

namespace polypeft {

// Do so many rows, all a launch has, go through `multiply_float` transposed?
bool is_tall(int64_t rows);

// W x + b for the tiles [tile, end) into y [rows][out]. x: [rows][in], or [in][rows] where `tall`.
// ahead: how many bytes after the codes of `tile` lies what this thread will likely read next.
void multiply_float(const float* x, int64_t rows, bool tall, const Weight& weight, int64_t tile,
                    int64_t end, int64_t ahead, float* y);

// Rows rounded to whole numbers of one, two or three signed bytes: x ≈ step · Σ 256^b · bytes[b], a step
// for each `group` inputs. There is room for a multiple of sixteen rows.
struct Rounded {
  int num_bytes;
  int64_t group, groups;   // inputs of a step; steps of a row
  int64_t stride;          // of a row's bytes
  int8_t* bytes[3];        // [rows][stride]
  float* steps;            // [rows][groups]; NaN where an input was not finite
  int32_t* sums;           // [rows][groups][num_bytes] of a group's bytes
};

// How rows for this weight are rounded, in `memory` of `rounded_bytes`, aligned to 64.
Rounded lay_out(const Weight& weight, int64_t rows, char* memory);
int64_t rounded_bytes(const Weight& weight, int64_t rows);

// Rounds the rows [from, to) of x, [rows][in], to the nearest.
void round_rows(const float* x, int64_t in, int64_t from, int64_t to, const Rounded& rounded);

// W x + b from the rows [row, row + rows), as `multiply_float`. An nf4 weight's table is rounded to
// eight bits where inputs have one byte or two. y: of the first row.
void multiply_integer(const Rounded& x, int64_t row, int64_t rows, const Weight& weight,
                      int64_t tile, int64_t end, int64_t ahead, float* y);

// The same by AMX's tiles, to the bit, where this CPU has them and they are the faster way; false,
// and nothing is done, where not.
bool multiply_amx(const Rounded& x, int64_t row, int64_t rows, const Weight& weight, int64_t tile,
                  int64_t end, int64_t ahead, float* y);

// The bits by which inputs that are to lose nothing are multiplied fastest: 24 by AMX, or 0.
int float_bits();

}  // namespace polypeft
