-- The rows of the training table: both files of the census extract, each row once. The test file
-- writes its classes with a full stop (`>50K.`); here they become those of the train file.
WITH together AS (
  SELECT *, 'train' AS split FROM adult_data
  UNION ALL BY NAME
  SELECT *, 'test' AS split FROM adult_test
)
SELECT
  row_id,  -- the row's identity, given by headrace; keep it
  split,
  age,
  workclass,
  fnlwgt,
  education,
  education_num,
  marital_status,
  occupation,
  relationship,
  race,
  sex,
  capital_gain,
  capital_loss,
  hours_per_week,
  native_country,
  rtrim(income, '.') AS income
FROM together
