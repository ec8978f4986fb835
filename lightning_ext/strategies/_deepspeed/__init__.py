"""Parts of DeepSpeedZeroPPStrategy."""
