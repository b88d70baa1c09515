//! The HTTP gateway.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;

use crate::App;

/// Serves until `app.shutdown` begins, then ends the open connections.
///
/// # Errors
/// When the listener fails.
pub async fn serve(app: Arc<App>, listener: TcpListener) -> std::io::Result<()> {
    let shutdown = app.shutdown.clone();
    let router = Router::new().route("/livez", get(|| async { "ok" })).route("/readyz", get(ready)).with_state(app);
    axum::serve(listener, router).with_graceful_shutdown(async move { drop(shutdown.wait().await) }).await
}

async fn ready(State(app): State<Arc<App>>) -> (StatusCode, String) {
    match app.dispatcher.ready() {
        Ok(()) => (StatusCode::OK, "ready".into()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason),
    }
}
