"""Stop the data-loader workers at the end of a run."""
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop


@HOOKS.register_module()
class StopWorkersHook(Hook):
    """Stop the persistent workers of all loops at the end of a run; another run starts others.

    Later it is slow. A Runner is freed by the garbage collector, which closes the queues to the
    workers before the DataLoader asks the workers to stop. The DataLoader then waits 5 s for each
    worker, and 5 s more if the worker ignores SIGTERM.
    """

    def after_run(self, runner):
        """Stop the workers while they can be asked."""
        for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
            iterator = loop.dataloader._iterator if isinstance(loop, BaseLoop) else None
            if iterator is not None:
                iterator._shutdown_workers()
                loop.dataloader._iterator = None
