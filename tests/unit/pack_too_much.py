"""Pack rows that take more memory than this process may have, say what is raised, and call once more."""

import resource
from pathlib import Path

import torch

import nsa_sel

pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**31
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
torch.manual_seed(0)
q, kv = torch.randn(1, 4096, 1, 4, 16), torch.randn(1, 1, 1, 16).expand(1, 1, 2**24, 16)
ranges = torch.tensor([0, 2**24]).expand(1, 4096, 1, 1, 2)
before = q.clone()
try:
    nsa_sel.selection_attention(q, kv, kv, ranges)
except RuntimeError as error:
    print(str(error).splitlines()[0])
assert torch.equal(q, before)
small = q[:, :8], kv[:, :, :40], kv[:, :, :40], ranges[:, :8]
difference = nsa_sel.selection_attention(*small) - nsa_sel.reference.oracle(*small)
assert difference.abs().max() < 1e-5
print("the next call is right")
