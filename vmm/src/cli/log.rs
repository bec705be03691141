//! The VMM's own log, on standard error.

use tracing::Level;

/// Starts logging from the level that STILLPOINT_LOG names (error, warn, info, debug or trace;
/// warn without it).
pub(super) fn start() {
    let wanted = std::env::var("STILLPOINT_LOG")
        .ok()
        .and_then(|name| name.parse().ok());
    // It can fail only when a subscriber is there already, which then serves.
    let _ = tracing_subscriber::fmt()
        .with_max_level(wanted.unwrap_or(Level::WARN))
        .with_writer(std::io::stderr)
        .without_time()
        .try_init();
}
