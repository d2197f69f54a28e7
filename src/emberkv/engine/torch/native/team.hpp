// The kernels as parts of one parallel region, so that a decode step forks and joins its threads once.
//
// Every thread of an OpenMP team calls them with equal arguments; a barrier is at the end of each. Outside a parallel
// region the caller computes alone. `threads` of the calls is not looked at.

#pragma once

#include "calls.hpp"

namespace emberkv {

// Several layers, of which none needs another's output, as one share of work.
void linear_by_team(const LinearCall* calls, int count);

void rms_norm_by_team(const NormCall& call);

// One row, by the thread that calls it. Inputs and output may be the same.
void rms_norm_row(const NormCall& call, int row);

void attend_by_team(const AttentionCall& call);

}  // namespace emberkv
