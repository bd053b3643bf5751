"""LazyMAR (arXiv 2503.12450): sampling from MAR with less work, because most of a step repeats the step before.

MAR generates an image in 64 autoregressive steps. Each step runs a transformer over all tokens to get a condition for
each token that is predicted next; classifier-free guidance runs it twice, with the class (the conditional branch) and
without (the unconditional branch). Then a small diffusion head turns noise into these tokens, given their conditions,
in 100 denoising steps. LazyMAR needs no training. The transformer computes all rows in both branches at a few steps,
the **refresh steps**; the **lazy steps** between them reuse features:

- **Token cache** (`caches.TokenCache`): features of most tokens hardly change from step to step. A lazy step runs the
  encoder on the buffer rows, which carry the class, and the newest tokens, those predicted at the step before. In the
  decoder it compares each row's values (the V of its attention) in one block, the **prune layer**, with those of the
  step before. From that attention on, only the newest tokens, the tokens predicted now and the least similar rows are
  recomputed. In the later blocks they attend to the cached keys and values of all others.
- **Condition cache** (`caches.ConditionCache`): the difference between the two branches of guidance changes slowly. A
  lazy step computes the conditional branch and adds the difference stored at the last refresh step (a policy may also
  store it at some lazy steps, which then compute both branches).
- **Head cache** (`head.HeadCache`): the head's blocks add nearly the same in successive denoising steps. At every
  autoregressive step, most denoising steps reuse what the blocks added before, and the guidance direction.

Read the files in this order:

1. `schedule.py`: what a step does (tokens, CFG scale, denoising timesteps). It knows nothing about caching.
2. `policy.py`, `selection.py`: LazyMAR's settings, and the rule that chooses rows. They know nothing about schedules.
3. `plan.py` combines both: it decides before the first step how much every step computes.
4. `caches.py`, `transformer.py`, `head.py`: the caches and the two loops that use them.
5. `sampler.py`: the loop over steps. The baseline is the same loop with a policy that caches nothing.

`assets/step.svg` shows where each cache acts in a step. `noise.py` is everything that is random, `flops.py` counts what
a plan costs, `graphs.py` runs steps as CUDA graphs.
"""
