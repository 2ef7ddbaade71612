"""Networks that no library has, or that none has as the papers do; ``task.model`` finds them by name before timm's."""
