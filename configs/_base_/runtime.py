"""Runtime of all three stages: mmpretrain's, plus EMA, resuming, and the reference's seed."""
_base_ = ['mmpretrain::_base_/default_runtime.py']

custom_imports = dict(imports=['nepa_mm'], allow_failed_imports=False)

# checkpoints hold raw weights and EMA weights (decay 0.9999)
custom_hooks = [dict(type='ModelEMAHook', momentum=1e-4)]
default_hooks = dict(
    runtime_info=dict(type='DeferredRuntimeInfoHook'),  # constant logging cost per iteration
    checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=3),
    resume=dict(type='ExactResumeHook'),
    guard=dict(type='NonFiniteGuardHook'),
    run_check=dict(type='RunCheckHook'),     # checks data, classes, schedule, weights before step 1
    unreadable=dict(type='UnreadableImageHook'),     # replaces unlabelled samples only
    workers=dict(type='StopWorkersHook'))

randomness = dict(seed=1337, diff_rank_seed=True)
resume = True   # the work_dir's checkpoint with the most progress; --no-resume starts anew
