"""LazyMAR (arXiv 2503.12450): sampling from MAR with less work, because most of a step repeats the step before.

MAR makes an image in some 64 autoregressive steps. Each runs a transformer over all tokens, twice under guidance, to
get a condition for each token that is predicted next; then a small diffusion head, itself run some 100 times, turns
noise into these tokens. LazyMAR needs no training. Every few steps it computes everything, which is a **refresh**; the
lazy steps in between reuse what hardly changes:

- **Token cache** (`caches.TokenCache`): features of tokens change little from step to step. A lazy step runs the
  encoder on the newest tokens alone. In the decoder it compares each row's values in the **prune layer** with those of
  the previous step; behind it only the least similar rows go on (`selection.RowSelection`), and attend to the stored
  keys and values of all others.
- **Condition cache** (`caches.ConditionCache`): how the unconditional branch of guidance differs from the conditional
  one changes slowly, too. A lazy step computes the conditional branch, and adds the difference stored at the refresh:
  half the work.
- **Head cache** (`head.HeadCache`): between neighbouring denoising steps the head's blocks add nearly the same. Most
  steps add what was stored, and only a few compute both branches and all blocks.

Other methods save elsewhere: fewer denoising steps (DiSA), other orders of prediction (GtR), other caches (ReCAP). Each
is a short declaration in `methods.py`, and several make a composition: `find_method("lazymar+disa")`.

Where to read: `methods.py` and `policy.py` say what may be varied, `schedules.py` how it runs over the steps; `plan.py`
decides from it, before the first step, what every step computes. `caches.py` and `selection.py` hold the rules above,
`transformer.py` and `head.py` the two short loops that they serve, `sampler.py` the loop around both. The baseline is
the same loops with empty caches. `noise.py` is all that is random, `flops.py` counts what a plan costs, `runtime.py`
executes it eagerly or as CUDA graphs.

A method of your own begins as a field of `Method`, or of `CachePolicy` if it is about caches, with its meaning in
`make_plan` and the rule in the cache that it concerns.
"""
