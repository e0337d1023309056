// The page at GET /docs: the OpenAPI document in Swagger UI.

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#routes",
  deepLinking: true,
  // Its validator is another host's.
  validatorUrl: null,
});
