//! How far a guest is followed that leads on and on.

use patcher::space::Bounds;

use super::values::Deadline;

/// Bounds of one look at a guest; a look that hits one fails, and says so.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct BoundsArgs {
    /// Give up a walk through the guest's memory after so many reads
    #[arg(long, value_name = "N", default_value_t = Bounds::USUAL.steps, value_parser = super::values::number)]
    pub walk_steps: u64,
    /// Give up a list of the guest's after so many entries
    #[arg(long, value_name = "N", default_value_t = Bounds::USUAL.entries)]
    pub walk_entries: usize,
    /// Give up a walk through the guest's memory after so much time, such as 500ms or 5s
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub walk_time: Deadline,
}

impl BoundsArgs {
    /// As the patcher takes them.
    #[must_use]
    pub const fn bounds(&self) -> Bounds {
        Bounds {
            steps: self.walk_steps,
            entries: self.walk_entries,
            time: self.walk_time.0,
            ..Bounds::USUAL
        }
    }
}
