//! Stacks made to order, in a guest whose kernel is made to order.

mod guest;
mod hostile;
mod repairs;
mod running;
mod sleeping;
