"use strict";

// A file of its own, because the content security policy allows no inline script.
window.addEventListener("load", () => {
  window.ui = SwaggerUIBundle({
    url: "/openapi.json",
    dom_id: "#swagger-ui",
    deepLinking: true,
    docExpansion: "list",
    defaultModelsExpandDepth: 0,
    displayRequestDuration: true,
    filter: true,
    persistAuthorization: true,
    // The validator badge would ask a server on the internet.
    validatorUrl: null,
    tryItOutEnabled: true,
  });
});
