#!/usr/bin/env python3
"""compare_dumps.py WANT GOT LIMIT [NAIVE]: two --dump files (or any safetensors of the same fp32,
fp64 and int32 tensors), tensor by tensor; or two log.jsonl, whose columns are the tensors.

The error of a tensor is |got - want| / |want| in the Euclidean norm; a tensor that is zero in WANT
must be zero in GOT (I3, unused is zero). LIMIT bounds it. With NAIVE, a dump of the plain version
of the same precision, a tensor may instead have twice the error of NAIVE's, or twice the median of
NAIVE's errors where that is more (a tensor of a few numbers can be lucky), and LIMIT is what is
allowed besides. Prints one line; exit status 1 where a tensor is over its bound, is missing or is
not finite.
"""

import array
import json
import math
import sys


def read(path):
    if path.endswith('.jsonl'):
        steps = [s for s in map(json.loads, open(path)) if 'loss' in s]
        return {name: [s[name] for s in steps] for name in ('loss', 'aux', 'z', 'grad_norm')}
    with open(path, 'rb') as f:
        n = int.from_bytes(f.read(8), 'little')
        header = json.loads(f.read(n))
        tensors = {}
        for name, t in header.items():
            if name == '__metadata__':
                continue
            f.seek(8 + n + t['data_offsets'][0])
            a = array.array({'F32': 'f', 'F64': 'd', 'I32': 'i'}[t['dtype']])
            a.frombytes(f.read(t['data_offsets'][1] - t['data_offsets'][0]))
            tensors[name] = a
    return tensors


def error(got, want):
    """Relative error; infinite where shapes differ, something is not finite, or a zero tensor is
    not zero."""
    if got is None or len(got) != len(want) or None in got or not all(map(math.isfinite, got)):
        return math.inf
    size = math.sqrt(math.fsum(x * x for x in want))
    difference = math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(got, want)))
    return difference / size if size else 0 if difference == 0 else math.inf


def main():
    want, got, limit = read(sys.argv[1]), read(sys.argv[2]), float(sys.argv[3])
    errors = {name: error(got.get(name), w) for name, w in want.items()}
    bounds = dict.fromkeys(want, limit)
    if len(sys.argv) > 4:
        naive = read(sys.argv[4])
        dispatch = {name: error(naive.get(name), w) for name, w in want.items()}
        median = sorted(dispatch.values())[len(dispatch) // 2]
        bounds = {name: limit + 2 * max(dispatch[name], median) for name in want}
    worst = max(want, key=lambda name: errors[name] / bounds[name])
    bad = [name for name in want if not errors[name] <= bounds[name]]
    extra = sorted(set(got) - set(want))
    print(
        '%d tensors, worst %s: %.2g of %.2g%s%s'
        % (
            len(want),
            worst,
            errors[worst],
            bounds[worst],
            ', over their bounds: ' + ', '.join(bad[:8]) if bad else '',
            ', not wanted: ' + ', '.join(extra[:4]) if extra else '',
        )
    )
    return 1 if bad or extra else 0


sys.exit(main())
