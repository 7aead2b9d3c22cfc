"""The end of a run that has stopped to improve."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from graftwork.errors import ConfigError
from graftwork.training.callbacks.progress import tell


class EarlyStop(EarlyStopping):
    """Ends the fit when ``monitor`` has not fallen for ``patience`` validations; what was best stays the result.

    A run that ended so ends at once when it is started again; ConfigError where nothing is validated.

    Args:
        patience: Validations without a new best that are waited for.
        monitor: Metric of which less is better.
    """

    def __init__(self, patience: int = 3, monitor: str = "val_loss") -> None:
        if patience < 1:
            raise ConfigError(f"early_stopping={patience} must be at least 1: the validations to wait for a new best.")
        super().__init__(monitor, patience=patience, mode="min", check_on_train_epoch_end=False, check_finite=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop again what had stopped; refuse a run in which nothing could ever stop it."""
        if not trainer.enable_validation:
            raise ConfigError(
                f"early_stopping={self.patience} needs validation: set data.validation or data.validation_fraction, "
                "and trainer.limit_val_batches above 0."
            )
        trainer.should_stop |= self.wait_count >= self.patience

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why the run is over."""
        if self.wait_count >= self.patience:
            tell(
                trainer,
                f"step {trainer.global_step}: stopped early, {self.monitor} has not fallen for {self.wait_count} "
                f"validations (best {float(self.best_score):.4f})",
            )
