-- The rows of the training table: every sample of water once, as it was measured.
SELECT
  row_id,  -- the row's identity, given by headrace; keep it
  ph,
  Hardness,
  Solids,
  Chloramines,
  Sulfate,
  Conductivity,
  Organic_carbon,
  Trihalomethanes,
  Turbidity,
  Potability
FROM water
