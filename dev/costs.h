// The least that each function of kernels/kernels.h must compute and move: every operand read once,
// every result written once, no matter how it is computed. COST(kernel, FLOPs, bytes), in plain
// arithmetic that C (dev/bench_cuda.cu) and Python (dev/ledger.py) both read: a measured share and
// a predicted time rest on the same line.
//
//   R rows (tokens)   T tokens of a sequence   C hidden width   Q = H*D, KVD = KV*D widths of the
//   heads   H heads   V vocabulary   N rows of a chunk of the head E experts   K experts of a token
//   F expert width   Z = R*K routed rows, without padding   P parameters of an optimizer call   x
//   bytes of floatX   4 of fp32
//
// experts_up_again is experts_up without A: what recompute wants. optimizer_adamw keeps fp32
// masters, sgd (no momentum) and adamw8 do not. Causal attention counts half of the square: forward
// 2 products, backward 5 (scores, dP, dq, dk, dv). A product of (R,N) and (O,N): 2 R O N.
COST(embed_forward, 0, 2 * R * C * x)
COST(embed_backward, 0, R *C *x + V * C * 4)
COST(rmsnorm_forward, 0, 2 * R * C * x)
COST(rmsnorm_backward, 0, 4 * R * C * x)
COST(add, 0, 3 * R * C * x)
COST(linear_forward_q, 2 * R * Q * C, (R * C + Q * C + R * Q) * x)
COST(linear_forward_kv, 2 * R * KVD * C, (R * C + KVD * C + R * KVD) * x)
COST(linear_forward_o, 2 * R * C * Q, (R * Q + C * Q + R * C) * x)
COST(linear_backward_input_q, 2 * R * Q * C, (R * Q + Q * C + R * C) * x)
COST(linear_backward_input_add_kv, 2 * R * KVD * C, (R * KVD + KVD * C + 2 * R * C) * x)
COST(linear_backward_input_o, 2 * R * C * Q, (R * C + C * Q + R * Q) * x)
COST(linear_backward_weight_q, 2 * R * Q * C, (R * Q + R * C) * x + Q * C * 4)
COST(linear_backward_weight_kv, 2 * R * KVD * C, (R * KVD + R * C) * x + KVD * C * 4)
COST(linear_backward_weight_o, 2 * R * C * Q, (R * C + R * Q) * x + C * Q * 4)
COST(qk_norm_rope_forward, 0, 2 * R * (Q + KVD) * x)
COST(qk_norm_rope_backward, 0, 3 * R * (Q + KVD) * x)
COST(attention_forward, 2 * R * T * Q, 2 * R * (Q + KVD) * x + R * H * 4)
COST(attention_backward, 5 * R * T * Q, 4 * R * (Q + KVD) * x + R * H * 4)
COST(router_forward, 2 * R * E * C, (R * C + E * C) * x + R * E * 4 + 2 * Z * 4)
COST(router_backward_add, 4 * R * E * C, (3 * R * C + E * C) * x + (2 * R * E + E * C + 3 * Z) * 4)
COST(row_index_build, 0, 3 * Z * 4)
COST(experts_up, 4 * Z * C * F, (R * C + 2 * E * F * C + 3 * Z * F) * x)
COST(experts_up_again, 4 * Z * C * F, (R * C + 2 * E * F * C + 2 * Z * F) * x)
COST(experts_down, 2 * Z * C * F, (Z * F + E * C * F + Z * C) * x)
COST(rows_weighted_sum, 0, (Z + R) * C * x + 2 * Z * 4)
COST(experts_down_backward, 2 * Z * C * F, (R * C + E * C * F + 5 * Z * F) * x + 2 * Z * 4)
COST(experts_up_backward, 4 * Z * C * F, (2 * Z * F + 2 * E * F * C + Z * C) * x)
COST(experts_wgrad, 6 * Z * C * F, (2 * R * C + 3 * Z * F) * x + 3 * E * F * C * 4)
COST(rows_gather, 0, 2 * R * C * x + R * 4)
COST(rows_sum, 0, (Z + R) * C * x + Z * 4)
COST(head_forward, 2 * N * V * C, (N * C + V * C + N * V) * x)
COST(cross_entropy, 0, 2 * N * V * x)
COST(head_backward_input, 2 * N * V * C, (N * V + V * C + N * C) * x)
COST(head_backward_weight, 2 * N * V * C, (N * V + N * C) * x + 2 * V * C * 4)
COST(gradient_squares, 0, P * 4)
COST(optimizer_sgd, 0, P *(2 * x + 4))
COST(optimizer_adamw, 0, P *(x + 28))
COST(optimizer_adamw8, 0, P *(2 * x + 8 + 1. / 16))
COST(init_segments, 0, P *(x + 4))
COST(convert, 0, P *(x + 4))
