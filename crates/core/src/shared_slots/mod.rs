//! Slots that processes share.
mod layout;
mod table;
#[cfg(test)]
mod tests;
